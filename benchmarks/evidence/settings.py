"""Which runs there are: every method, its trials, and the ablations."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from torch import nn

import topkast_func as tk

SMALL = "small dense"
METHODS = ("dense", SMALL, "static", "set", "rigl", "topkast", "random_backward", "gmp", "ste")
"""The arms; "small dense" is a dense network with as many parameters as the sparse ones use."""

PAIRS = ((0.8, 0.5), (0.9, 0.8), (0.95, 0.9), (0.98, 0.95))
"""Forward and backward sparsities; those that do not explore read the first."""

TUNED_AT = (0.9, 0.8)
SEEDS, TUNING_SEED = (0, 1, 2), 100
STOP = 0.75
"""Share of the run after which SET and RigL stop exchanging weights, as in RigL's paper."""


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        task: Name of the task.
        method: One of `METHODS`.
        forward: Forward sparsity, fraction.
        backward: Backward sparsity, fraction.
        seed: Of weights, batches and random sets.
        validate: Whether a part of the training data is held out to be scored; otherwise the
            test data is.
        lr: Learning rate at the start; it falls along half a cosine to 0.
        weight_decay: Of Adam, as an L2 gradient.
        penalty: Form of the exploration penalty.
        penalty_weight: Its weight.
        refresh_every: Steps between refreshes.
        drop_fraction: Of SET and RigL.
        until: Share of the run after which the sets stay, or at which pruning is done.
    """

    task: str
    method: str
    forward: float = 0.9
    backward: float = 0.8
    seed: int = 0
    validate: bool = False
    lr: float = 1e-3
    weight_decay: float = 0.0
    penalty: Any = "l2"
    penalty_weight: float = 1e-3
    refresh_every: int = 100
    drop_fraction: float = 0.3
    until: float | None = None

    def config(self, model: Any, steps: int) -> tk.TopKastConfig:
        """Return the configuration of the run.

        Args:
            model: The network; embeddings and its last layer stay dense.
            steps: How many steps the run has.

        Returns:
            The configuration.
        """
        end = None if self.until is None else round(self.until * steps)
        pruning = self.method == "gmp"
        embeddings = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
        dense = [
            *(f"{n}.weight" for n in embeddings),
            tk.last_weight(dict(model.named_parameters())),
        ]
        return tk.TopKastConfig(
            self.forward,
            self.backward,
            refresh_every=self.refresh_every,
            explore_until=None if pruning else end,
            penalty=self.penalty,
            penalty_weight=self.penalty_weight,
            method=self._method(end),
            keep_dense=dense,
        )

    def _method(self, end: int | None) -> tk.Method:
        if self.method in {"set", "rigl"}:
            return getattr(tk, self.method)(self.drop_fraction)  # type: ignore[no-any-return]
        if self.method == "gmp":
            return tk.gmp(0, end or 1)
        method = "dense" if self.method == SMALL else self.method
        return getattr(tk, method)()  # type: ignore[no-any-return]

    def told(self) -> dict[str, Any]:
        """Return what is not the default, to be kept in a file."""
        default = Setting(self.task, self.method)
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = ("task", "method", "seed")
        return {n: v for n, v in told.items() if n in kept or v != getattr(default, n)}


def trials(task: str, method: str) -> list[Setting]:
    """Return the settings among which one is chosen on held out data: six for every method.

    Args:
        task: Name of the task.
        method: The method.

    Returns:
        The settings, at one sparsity and one seed.
    """
    forward, backward = TUNED_AT
    base = Setting(task, method, forward, backward, TUNING_SEED, validate=True)
    axes: dict[str, tuple[Any, ...]] = {"lr": (1e-3, 3e-3)}
    if method in {"topkast", "random_backward"}:
        axes["penalty_weight"] = (1e-4, 1e-3, 1e-2)
    elif method == "ste":
        axes["refresh_every"] = (1, 10, 100)
    elif method in {"set", "rigl"}:
        base, axes["drop_fraction"] = replace(base, until=STOP), (0.1, 0.3, 0.5)
    elif method == "gmp":
        axes["until"] = (0.5, 0.75, 0.9)
    else:
        axes = {"lr": (3e-4, 1e-3, 3e-3), "weight_decay": (0.0, 1e-4)}
    return [replace(base, **dict(zip(axes, v, strict=True))) for v in product(*axes.values())]


def comparison(tuned: Mapping[str, Setting]) -> Iterator[Setting]:
    """Yield the runs that are compared: every method at every sparsity with every seed.

    Args:
        tuned: The setting that was chosen, by method.

    Yields:
        Settings whose score is that of the test data.
    """
    for seed in SEEDS:
        for method, chosen in tuned.items():
            run = replace(chosen, seed=seed, validate=False)
            for forward, backward in PAIRS[:1] if method == "dense" else PAIRS:
                yield replace(run, forward=forward, backward=backward)


def ablations(tuned: Mapping[str, Setting]) -> Iterator[tuple[str, Setting]]:
    """Yield the runs of the paper's ablations: one thing at a time changes.

    Args:
        tuned: The setting that was chosen, by method.

    Yields:
        What changes, and the setting.
    """
    base = replace(tuned["topkast"], validate=False)
    changes: dict[str, tuple[Any, ...]] = {
        "refresh_every": (1, 10, 100, 1000),
        "backward": (0.0, 0.5, 0.8, 0.9),
        "until": (0.1, 0.25, 0.5, 0.75, None),
        "penalty_weight": (0.0, 1e-5, 1e-4, 1e-3, 1e-2),
        "penalty": (None, "l1", "group_l2", "l2"),
    }
    for name, values in changes.items():
        for value, seed in product(values, SEEDS):
            yield name, replace(base, seed=seed, **{name: value})
