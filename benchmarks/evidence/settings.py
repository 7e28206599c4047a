"""Which runs there are: every method, its trials, and the ablations."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, NamedTuple

from torch import nn

import topkast_func as tk

SMALL, ZERO = "small dense", "topkast from zero"
METHODS = (
    "dense",
    SMALL,
    "static",
    "set",
    "rigl",
    "topkast",
    ZERO,
    "random_backward",
    "gmp",
    "ste",
)
"""The arms: "small dense" is a dense network with as many parameters as the sparse ones use,
"topkast" the form of the paper, "topkast from zero" the one in which what enters A starts at 0."""

PAIRS = ((0.8, 0.5), (0.9, 0.8), (0.95, 0.9), (0.98, 0.95))
"""Forward and backward sparsities; those that do not explore read the first."""

FIRST = "mlp"
"""Where every hyperparameter is chosen; the other tasks carry these choices on."""

TUNING_SEED = 100
STOP = 0.75
"""Share of the run after which SET and RigL stop exchanging weights, as in RigL's paper."""


class Plan(NamedTuple):
    """How much is run of a task.

    Attributes:
        pairs: Forward and backward sparsities.
        tuned_at: The pair of the trials.
        rates: Learning rates of the trials.
        seeds: Of the runs that are compared.
        trial_steps: Share of a run's steps that a trial has.
        alternatives: By method, what is tried beside the choice that is carried on.
        ablations: Of Top-KAST from zero at its tuned setting: what one field at a time is changed
            to.
    """

    pairs: tuple[tuple[float, float], ...]
    tuned_at: tuple[float, float]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    trial_steps: float
    alternatives: Mapping[str, Mapping[str, Any]]
    ablations: Mapping[str, tuple[Any, ...]]


ABLATIONS: Mapping[str, tuple[Any, ...]] = {
    "entry": ("value", "zero", "threshold"),
    "exchange": (0.01, 0.03, 0.1, 0.3, None),
    "refresh_every": (10, 30, 100, 300, 1000),
    "penalty_weight": (0.0, 1e-5, 1e-4, 1e-3),
    "beta2": (0.95, 0.99, 0.999),
    "lr": (1e-3, 3e-3, 1e-2),
    "backward": (0.0, 0.5, 0.8, 0.9),
    "until": (0.25, 0.5, 0.75, None),
}

PLANS = {
    "mlp": Plan(
        PAIRS,
        PAIRS[1],
        (1e-3, 3e-3, 1e-2),
        (0, 1, 2),
        1.0,
        {},
        ABLATIONS,
    ),
    "cnn": Plan(PAIRS, PAIRS[1], (1e-3, 3e-3, 1e-2), (0, 1, 2), 1.0, {}, ABLATIONS),
    "text": Plan(
        PAIRS,
        PAIRS[0],
        (1e-3, 3e-3),
        (0, 1, 2),
        0.25,
        {
            "topkast": {"refresh_every": 1, "penalty_weight": 0.0},
            ZERO: {"exchange": 0.01},
            "random_backward": {"refresh_every": 1, "penalty_weight": 0.0},
            "ste": {"refresh_every": 10},
            "set": {"drop_fraction": 0.1},
            "rigl": {"drop_fraction": 0.1},
            "gmp": {"until": 0.5},
            "static": {"weight_decay": 1e-4},
            "dense": {"weight_decay": 1e-4},
            SMALL: {"weight_decay": 1e-4},
        },
        {},
    ),
}


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
        steps: Share of the task's steps.
        lr: Learning rate at its highest; it falls along half a cosine to 0.
        weight_decay: Of Adam, as an L2 gradient.
        penalty: Form of the exploration penalty.
        penalty_weight: Its weight.
        refresh_every: Steps between refreshes.
        entry: With what a weight starts that newly enters A; of the methods that explore.
        exchange: Largest share of A that a refresh exchanges; of the methods that explore.
        drop_fraction: Of SET and RigL.
        until: Share of the run after which the sets stay, or at which pruning is done.
        beta2: Of Adam; None for the task's own.
    """

    task: str
    method: str
    forward: float = 0.9
    backward: float = 0.8
    seed: int = 0
    validate: bool = False
    steps: float = 1.0
    lr: float = 1e-3
    weight_decay: float = 0.0
    penalty: Any = "l2"
    penalty_weight: float = 1e-3
    refresh_every: int = 100
    drop_fraction: float = 0.3
    until: float | None = None
    entry: Any = "value"
    exchange: float | None = None
    beta2: float | None = None

    def config(self, model: Any, steps: int) -> tk.TopKastConfig:
        """Return the configuration of the run.

        Args:
            model: The network; embeddings, its first convolution and last layer stay dense.
            steps: How many steps the run has.

        Returns:
            The configuration.
        """
        end = None if self.until is None else round(self.until * steps)
        pruning = self.method == "gmp"
        modules = list(model.named_modules())
        embeddings = [n for n, m in modules if isinstance(m, nn.Embedding)]
        convolutions = [n for n, m in modules if isinstance(m, nn.Conv2d)]
        dense = [
            *(f"{n}.weight" for n in (*embeddings, *convolutions[:1])),
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
        if self.method in {"topkast", ZERO}:
            return tk.topkast(self.entry, self.exchange)
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


def trials(task: str, carried: Mapping[str, Setting] | None = None) -> dict[str, list[Setting]]:
    """Return the settings among which one is chosen on held out data: as many for every method.

    Args:
        task: Name of the task.
        carried: What was chosen on another task, by method. Then this and the alternatives of
            the task are tried with each learning rate; without it there are trials of each
            method's own hyperparameters with each.

    Returns:
        The settings by method, at one sparsity and one seed.
    """
    plan = PLANS[task]
    forward, backward = plan.tuned_at
    found = {}
    for method in METHODS:
        base = replace(
            carried[method] if carried else start(task, method),
            task=task,
            forward=forward,
            backward=backward,
            seed=TUNING_SEED,
            validate=True,
            steps=plan.trial_steps,
        )
        bases = [base, replace(base, **plan.alternatives.get(method, {}))]
        axes = {"lr": plan.rates} if carried else _axes(method, plan.rates)
        settings = [
            replace(base, **dict(zip(axes, values, strict=True)))
            for base, values in product(bases, product(*axes.values()))
        ]
        found[method] = list(dict.fromkeys(settings))
    return found


def start(task: str, method: str) -> Setting:
    """Return what a method's trials have in common."""
    if method == ZERO:
        return Setting(task, method, entry="zero", penalty_weight=0.0, until=STOP)
    return Setting(task, method)


def _axes(method: str, rates: tuple[float, ...]) -> dict[str, tuple[Any, ...]]:
    if method == ZERO:
        return {"lr": rates, "exchange": (0.03, 0.1, None)}
    if method in {"topkast", "random_backward"}:
        return {"lr": rates, "penalty_weight": (1e-4, 1e-3, 1e-2)}
    if method == "ste":
        return {"lr": rates, "refresh_every": (1, 10, 100)}
    if method in {"set", "rigl"}:
        return {"lr": rates, "until": (STOP,), "drop_fraction": (0.1, 0.3, 0.5)}
    if method == "gmp":
        return {"lr": rates, "until": (0.5, 0.75, 0.9)}
    return {"lr": rates, "weight_decay": (0.0, 1e-5, 1e-4)}


def comparison(tuned: Mapping[str, Setting]) -> Iterator[Setting]:
    """Yield the runs that are compared: every method at every sparsity with every seed.

    Args:
        tuned: The setting that was chosen, by method.

    Yields:
        Settings whose score is that of the test data.
    """
    plan = PLANS[tuned["dense"].task]
    for seed in plan.seeds:
        for method, chosen in tuned.items():
            for forward, backward in plan.pairs[:1] if method == "dense" else plan.pairs:
                yield replace(chosen, seed=seed, forward=forward, backward=backward)


def ablations(tuned: Mapping[str, Setting]) -> Iterator[tuple[str, Setting]]:
    """Yield the runs of the paper's ablations: one thing at a time changes.

    Args:
        tuned: The setting that was chosen, by method.

    Yields:
        What changes, and the setting.
    """
    base = tuned[ZERO]
    plan = PLANS[base.task]
    for name, values in plan.ablations.items():
        for value, seed in product(values, plan.seeds):
            yield name, replace(base, seed=seed, **{name: value})
