"""Tables and figures of what was reached, from the results alone."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from matplotlib.figure import Figure

from benchmarks.evidence.settings import (
    FIRST,
    PAIRS,
    PLANS,
    SEEDS,
    SMALL,
    USUAL,
    Setting,
    ablations,
    trials,
)
from benchmarks.evidence.tasks import TASKS
from benchmarks.record import RESULTS
from benchmarks.views import markdown
from topkast_func.report import plots

Runs: TypeAlias = Sequence[Mapping[str, Any]]
Tuned: TypeAlias = Mapping[str, Setting]
Pair: TypeAlias = tuple[float, float]


def path(task: str, folder: Path = RESULTS) -> Path:
    """Return where the runs of a task are kept."""
    return folder / f"evidence_{task}.json"


def read(path: Path) -> list[dict[str, Any]]:
    """Read the runs in a file; none if it is not there."""
    return list(json.loads(path.read_text())["runs"]) if path.exists() else []


def load(task: str, folder: Path = RESULTS) -> "Evidence":
    """Read the runs of a task; its trials must be among them."""
    runs = read(path(task, folder))
    return Evidence(task, runs, tuned(runs, task, carried(task, folder)))


def ready(folder: Path = RESULTS) -> dict[str, "Evidence"]:
    """Read every task whose trials are done; the others are still to be run."""
    found = {}
    for task in PLANS:
        runs = read(path(task, folder))
        tried = trials(task, carried(task, folder))
        if all(find(runs, setting) for several in tried.values() for setting in several):
            found[task] = load(task, folder)
    return found


def carried(task: str, folder: Path = RESULTS) -> Tuned | None:
    """Return what was chosen on the first task, by method; None for that task itself."""
    return None if task == FIRST else load(FIRST, folder).tuned


def tuned(runs: Runs, task: str, carried: Tuned | None = None) -> Tuned:
    """Return the best trial of every method, the first of equals, to be run whole and tested."""
    sign, found = TASKS[task].sign, trials(task, carried)
    best = {m: max(several, key=lambda s: sign * score(runs, s)) for m, several in found.items()}
    return {m: replace(setting, validate=False, steps=1.0) for m, setting in best.items()}


def find(runs: Runs, setting: Setting) -> Mapping[str, Any] | None:
    """Return what a setting came to, if it was run."""
    told = setting.told()
    return next((run for run in runs if run["setting"] == told), None)


def score(runs: Runs, setting: Setting) -> float:
    """Return the score of a setting that was run."""
    run = find(runs, setting)
    if run is None:
        raise ValueError(f"{setting} was not run")
    return float(run["score"])


class Evidence(NamedTuple):
    """What was run of a task, and the tuned setting of every method."""

    task: str
    runs: Runs
    tuned: Tuned

    def of(self, method: str, pair: Pair) -> Runs:
        """Return the runs of a method at a pair of sparsities, one for each seed, or of none."""
        if method not in self.tuned:
            return []
        pairs = PAIRS[:2] if method == "dense" else (pair,)  # which of them does not matter to it
        tuned = [replace(self.tuned[method], forward=f, backward=b) for f, b in pairs]
        runs = ([find(self.runs, replace(base, seed=seed)) for base in tuned] for seed in SEEDS)
        return [next(filter(None, found)) for found in runs if any(found)]

    def table(self) -> str:
        """Return every method: scores at every sparsity and, in parentheses, operations; shock."""
        pairs = PLANS[self.task].pairs
        rows = [
            (
                name(m),
                *(cell(self.of(m, pair)) for pair in pairs),
                shock(self.tuned[m], self.of(m, USUAL)),
            )
            for m in self.tuned
        ]
        return markdown(("method", *map(shown, pairs), f"shock at {shown(USUAL)}"), rows)

    def ablation_table(self) -> str:
        """Return what Top-KAST reaches when one thing at a time changes: a row for what was run."""
        found: dict[str, dict[Any, list[Mapping[str, Any]]]] = {}
        for field, setting in ablations(self.tuned):
            if run := find(self.runs, setting):
                value = getattr(setting, field)
                found.setdefault(field, {}).setdefault(value, []).append(run)
        rows = [
            (name(field), ", ".join(f"{value}: {cell(runs)}" for value, runs in values.items()))
            for field, values in found.items()
            if len(values) > 1
        ]
        return markdown(("what changes", "to what, and what that reaches"), rows)

    def margin(self, method: str, other: str, pair: Pair) -> float:
        """Return by how much a method is better than another, if by more than the seeds spread.

        That is the larger of the two deviations; up to it, and without runs of both, it is 0.
        """
        own, theirs = self.of(method, pair), self.of(other, pair)
        if not own or not theirs:
            return 0.0
        margin = TASKS[self.task].sign * (_mean(own) - _mean(theirs))
        return margin if abs(margin) > max(_deviation(own), _deviation(theirs)) else 0.0

    def standing(self, method: str) -> str:
        """Return whom a method is behind and ahead of at every sparsity, and by how much."""
        rows = []
        for pair in PLANS[self.task].pairs:
            margins = {name(other): self.margin(method, other, pair) for other in self.tuned}
            told = ([f"{o} {by:+.2f}" for o, by in margins.items() if s * by > 0] for s in (-1, 1))
            rows.append((shown(pair), *map(", ".join, told)))
        return markdown((name(method), "is behind", "is ahead of"), rows)

    def figure(self) -> Figure:
        """Draw the scores over forward sparsity."""
        scores = {
            name(m): {pair[0]: [run["score"] for run in self.of(m, pair)] for pair in PAIRS}
            for m in self.tuned
        }
        dense = scores.pop("dense")[PAIRS[0][0]]
        return plots.accuracy(scores, dense, TASKS[self.task].unit)


def cell(several: Runs) -> str:
    """Return the mean score of runs, its deviation if they are several, and the operations."""
    if not several:
        return ""
    deviation = f" ± {_deviation(several):.2f}" if len(several) > 1 else ""
    flops = statistics.mean(run["flops"] for run in several)
    return f"{_mean(several):.2f}{deviation} ({flops:.2f}×)"


def shock(setting: Setting, several: Runs) -> str:
    """Return the median over runs and refreshes of the shock, and the largest in parentheses."""
    if setting.method in {"dense", SMALL}:
        return "no sets"
    shocks = [run["shock"] for run in several if run.get("shock")]
    if not shocks:
        return "sets of each step" if setting.often else ""
    return f"{statistics.median(s[0] for s in shocks):.2f} ({max(s[1] for s in shocks):.2f})"


def _mean(several: Runs) -> float:
    return float(statistics.mean(run["score"] for run in several))


def _deviation(several: Runs) -> float:
    return statistics.stdev(run["score"] for run in several) if len(several) > 1 else 0.0


def shown(pair: Pair) -> str:
    """Write a pair of sparsities in per cent."""
    return f"{100 * pair[0]:.0f} / {100 * pair[1]:.0f} %"


def name(method: str) -> str:
    """Write the name of a method or a field in words."""
    return method.replace("_", " ")
