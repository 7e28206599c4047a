"""Which runs there are: every method, its trials, the comparison and the ablations."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import chain, product
from typing import Any, NamedTuple, TypeAlias

from torch import nn

import topkast_func as tk
from benchmarks.evidence.tasks import TASKS

SMALL, ZERO, DEFAULTS = "small dense", "topkast from zero", "default topkast"
STOP = 0.75  # share of the run after which sets stay, as in RigL's paper


class Method(NamedTuple):
    """What is run of a method."""

    tried: Mapping[str, tuple[Any, ...]]  # what matters most to it, on the first task
    alternatives: tuple[Mapping[str, Any], ...]  # elsewhere; the first that is not that choice
    common: Mapping[str, Any] = {}  # to all of its runs


_DECAYED = Method(
    {"weight_decay": (0.0, 1e-5, 1e-4)}, ({"weight_decay": 1e-4}, {"weight_decay": 0.0})
)
_EXCHANGED = Method(
    {"drop_fraction": (0.1, 0.3, 0.5)},
    ({"drop_fraction": 0.1}, {"drop_fraction": 0.3}),
    {"until": STOP},
)
_EXPLORED = Method(
    {"penalty_weight": (1e-4, 1e-3, 1e-2)}, ({"refresh_every": 1, "penalty_weight": 0.0},)
)
_FROM_ZERO = Method(
    {"penalty_weight": (0.0, 1e-5, 1e-4)},
    ({"penalty_weight": 0.0}, {"penalty_weight": 1e-4}),
    {"entry": "zero", "exchange": 0.05, "until": STOP},
)
METHODS = {
    "dense": _DECAYED,
    SMALL: _DECAYED,
    "static": _DECAYED,
    "set": _EXCHANGED,
    "rigl": _EXCHANGED,
    "topkast": _EXPLORED,
    ZERO: _FROM_ZERO,
    "random_backward": _EXPLORED,
    "gmp": Method({"until": (0.5, 0.75, 0.9)}, ({"until": 0.5}, {"until": 0.75})),
    "ste": Method({"refresh_every": (1, 10, 100)}, ({"refresh_every": 10}, {"refresh_every": 1})),
}
"""The arms: "small dense" is a dense network with as many parameters as the sparse ones use,
"topkast" the form of the paper, "topkast from zero" the one in which what enters A starts at 0."""

FIRST, TUNING_SEED, SEEDS = "mlp", 100, (0, 1, 2)
PAIRS = ((0.8, 0.5), (0.9, 0.8), (0.95, 0.9), (0.98, 0.95))  # forward and backward sparsity
USUAL = PAIRS[1]
ABLATIONS: Mapping[str, tuple[Any, ...]] = {  # of Top-KAST from zero: one thing at a time changes
    "entry": ("value", "zero", "threshold"),
    "exchange": (0.01, 0.05, 0.1, 0.3, None),
    "refresh_every": (10, 30, 100, 300, 1000),
    "penalty_weight": (0.0, 1e-5, 1e-4, 1e-3),
    "beta2": (None, 0.95, 0.99, 0.999),
    "lr": (1e-3, 3e-3, 1e-2),
    "backward": (0.0, 0.5, 0.8, 0.9),
    "until": (0.25, 0.5, 0.75, None),
}


class Plan(NamedTuple):
    """How much is run of a task."""

    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)  # learning rates of the trials
    pairs: tuple[tuple[float, float], ...] = PAIRS  # of the comparison
    tuned_at: tuple[float, float] = USUAL  # the pair of the trials
    trial_steps: float = 1.0  # share of a run's steps that a trial has
    alternatives: bool = True  # whether one is tried
    ablations: Mapping[str, tuple[Any, ...]] = ABLATIONS
    methods: tuple[str, ...] = tuple(METHODS)


_DECISIVE = {n: values for n, values in ABLATIONS.items() if n not in {"backward", "until"}}
_WITH_ADAM = ("dense", SMALL, "static", "set", "rigl", "topkast", ZERO)
_UNDER_SGD = Plan(
    (0.03, 0.1, 0.3), PAIRS[:2], ablations={}, methods=("dense", "static", "topkast", ZERO)
)
PLANS = {
    "mlp": Plan(alternatives=False),
    "cnn": Plan((3e-3, 1e-2, 3e-2), PAIRS[:3], ablations={}),
    "text": Plan((1e-3, 3e-3), PAIRS[:3], tuned_at=PAIRS[0], trial_steps=0.25, ablations=_DECISIVE),
    "source": Plan(
        (1e-3, 3e-3, 1e-2, 3e-2),
        PAIRS[1:2],
        trial_steps=0.25,
        alternatives=False,
        ablations={},
        methods=_WITH_ADAM,
    ),
    "mlp_sgd": _UNDER_SGD,
    "cnn_sgd": _UNDER_SGD,
}


@dataclass(frozen=True)
class Setting:
    """One run; sparsities, steps and until are fractions."""

    task: str
    method: str
    forward: float = 0.9  # sparsity
    backward: float = 0.8  # sparsity
    seed: int = 0  # of weights, batches and random sets
    validate: bool = False  # score data held out from the training part, not the test data
    steps: float = 1.0  # share of the task's steps
    lr: float = 1e-3  # at its highest; it falls along half a cosine to 0
    weight_decay: float = 0.0  # as an L2 gradient
    penalty: Any = "l2"
    penalty_weight: float = 1e-3
    refresh_every: int = 100
    drop_fraction: float = 0.3  # of SET and RigL
    until: float | None = None  # share of the run after which the sets stay or pruning is done
    entry: Any = "value"  # with what a weight starts that newly enters A; of Top-KAST
    exchange: float | None = None  # largest share of A that a refresh exchanges; of Top-KAST
    beta2: float | None = None  # of Adam; None for the task's own

    def config(self, model: nn.Module, steps: int) -> tk.TopKastConfig:
        """Return the configuration of a run of so many steps.

        Embeddings, the first convolution and the last layer stay dense.
        """
        end = None if self.until is None else round(self.until * steps)
        modules = list(model.named_modules())
        kept = [f"{name}.weight" for name, m in modules if isinstance(m, nn.Embedding)]
        kept += [f"{name}.weight" for name, m in modules if isinstance(m, nn.Conv2d)][:1]
        return tk.TopKastConfig(
            self.forward,
            self.backward,
            refresh_every=self.refresh_every,
            explore_until=None if self.method == "gmp" else end,
            penalty=self.penalty,
            penalty_weight=self.penalty_weight,
            method=self._method(end or 1),
            keep_dense=[*kept, tk.last_weight(dict(model.named_parameters()))],
        )

    def _method(self, end: int) -> tk.Method:
        drawn: dict[str, tk.Method] = {
            SMALL: tk.dense(),
            "topkast": tk.topkast(self.entry, self.exchange),
            ZERO: tk.topkast(self.entry, self.exchange),
            "set": tk.set(self.drop_fraction),
            "rigl": tk.rigl(self.drop_fraction),
            "gmp": tk.gmp(0, end),
        }
        return drawn.get(self.method) or getattr(tk, self.method)()

    @property
    def often(self) -> bool:
        """Whether indexing the sets anew each time would cost more than dense storage."""
        return self.refresh_every < 10

    def told(self) -> dict[str, Any]:
        """Return what is not the default, to be kept in a file."""
        default = Setting(self.task, self.method)
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = ("task", "method", "seed")
        return {n: v for n, v in told.items() if n in kept or v != getattr(default, n)}


Tuned: TypeAlias = Mapping[str, Setting]  # the setting of each method


def trials(task: str, carried: Tuned | None = None) -> dict[str, list[Setting]]:
    """Return the settings among which one is chosen on held out data: as many for every method.

    They are at one sparsity and one seed: with each learning rate what is tried of it, or what
    was chosen on the first task and is ``carried`` on, and an alternative to that.
    """
    plan = PLANS[task]
    common: dict[str, Any] = {"task": task, "steps": plan.trial_steps, "seed": TUNING_SEED}
    common |= {"forward": plan.tuned_at[0], "backward": plan.tuned_at[1], "validate": True}
    found = {}
    for method in plan.methods:
        known = METHODS[method]
        first = carried[method] if carried else Setting(task, method, **known.common)
        base = replace(first, **common)
        others = [other for a in known.alternatives if (other := replace(base, **a)) != base]
        bases = [base, *others[: int(plan.alternatives)]]
        axes = {"lr": plan.rates, **({} if carried else known.tried)}
        settings = [
            replace(base, **dict(zip(axes, values, strict=True)))
            for base, values in product(bases, product(*axes.values()))
        ]
        found[method] = list(dict.fromkeys(settings))
    return found


def tuned(runs: Mapping[Setting, Any], task: str, carried: Tuned | None = None) -> Tuned:
    """Return the best trial of every method, the first of equals, to be run whole and tested.

    Top-KAST from zero is there, too, with all that `TopKastConfig` sets, at the rate tuned for it.
    """
    sign, found = TASKS[task].sign, trials(task, carried)
    if missing := {*chain(*found.values())} - runs.keys():
        raise ValueError(f"{missing} was not run")
    best = {m: max(several, key=lambda s: sign * runs[s]["score"]) for m, several in found.items()}
    whole = {m: replace(setting, validate=False, steps=1.0) for m, setting in best.items()}
    usual = tk.TopKastConfig().penalty_weight
    return {**whole, DEFAULTS: replace(whole[ZERO], penalty_weight=usual, until=None)}


def comparison(tuned: Tuned) -> Iterator[Setting]:
    """Yield every tuned method at every sparsity with every seed, scored on the test data."""
    for seed in SEEDS:
        for method, chosen in tuned.items():
            pairs = PLANS[chosen.task].pairs
            for forward, backward in pairs[:1] if method == "dense" else pairs:
                yield replace(chosen, seed=seed, forward=forward, backward=backward)


def ablations(tuned: Tuned) -> Iterator[tuple[str, Setting]]:
    """Yield the tuned Top-KAST from zero with one thing at a time changed, and what changes."""
    for name, values in PLANS[tuned[ZERO].task].ablations.items():
        for value, seed in product(values, SEEDS):
            yield name, replace(tuned[ZERO], seed=seed, **{name: value})
