"""Tables and figures of what was reached, from the results alone."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.evidence.settings import FIRST, PLANS, SEEDS, USUAL, Setting, ablations, tuned
from benchmarks.evidence.tasks import TASKS
from benchmarks.record import RESULTS
from benchmarks.views import markdown
from topkast_func.report import plots

Run: TypeAlias = Mapping[str, Any]  # what a setting came to, and when
Pair: TypeAlias = tuple[float, float]
JUMPS = RESULTS / "jumps.json"


def path(task: str) -> Path:
    """Return where the runs of a task are kept."""
    return RESULTS / f"evidence_{task}.json"


def read(path: Path) -> dict[Setting, Run]:
    """Read the runs in a file; none if it is not there."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else ()
    return {Setting(**run["setting"]): run for run in runs}


def load(task: str) -> "Evidence":
    """Read the runs of a task; its trials must be among them."""
    runs = read(path(task))
    return Evidence(task, runs, tuned(runs, task, carried(task)))


def ready() -> dict[str, "Evidence"]:
    """Read every task."""
    return {task: load(task) for task in PLANS}


def carried(task: str) -> Mapping[str, Setting] | None:
    """Return what was chosen on the first task, by method; None for that task itself."""
    return None if task == FIRST else load(FIRST).tuned


class Evidence(NamedTuple):
    """What was run of a task, and the tuned setting of every method."""

    task: str
    runs: Mapping[Setting, Run]
    tuned: Mapping[str, Setting]

    def of(self, method: str, pair: Pair) -> list[Run]:
        """Return the runs of a method at a pair of sparsities, one for each seed, or of none."""
        if method not in self.tuned:
            return []
        pair = PLANS[self.task].pairs[0] if method == "dense" else pair  # it has no others
        base = replace(self.tuned[method], forward=pair[0], backward=pair[1])
        settings = (replace(base, seed=seed) for seed in SEEDS)
        return [self.runs[setting] for setting in settings if setting in self.runs]

    def table(self) -> str:
        """Return every method: scores at every sparsity and, in parentheses, operations; shock."""
        pairs = PLANS[self.task].pairs
        rows = []
        for method, setting in self.tuned.items():
            cells = [cell(self.of(method, pair)) for pair in pairs]
            rows.append((name(method), *cells, shock(setting, self.of(method, USUAL))))
        return markdown(("method", *map(shown, pairs), f"shock at {shown(USUAL)}"), rows)

    def ablation_table(self) -> str:
        """Return what Top-KAST reaches when one thing at a time changes: a row for what was run."""
        found: dict[str, dict[Any, list[Run]]] = defaultdict(lambda: defaultdict(list))
        for field, setting in ablations(self.tuned):
            if setting in self.runs:
                found[field][getattr(setting, field)].append(self.runs[setting])
        told = {f: [f"{v}: {cell(runs)}" for v, runs in of.items()] for f, of in found.items()}
        rows = [(name(field), ", ".join(cells)) for field, cells in told.items() if len(cells) > 1]
        return markdown(("what changes", "to what, and what that reaches"), rows)

    def margin(self, method: str, other: str, pair: Pair) -> float:
        """Return by how much a method is better than another, if by more than the seeds spread.

        That is the larger of the two deviations; up to it, and without runs of both, it is 0.
        """
        own, theirs = self.of(method, pair), self.of(other, pair)
        if not own or not theirs:
            return 0.0
        (mean, deviation), (other_mean, other_deviation) = _spread(own), _spread(theirs)
        margin = TASKS[self.task].sign * (mean - other_mean)
        return margin if abs(margin) > max(deviation, other_deviation) else 0.0

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
        pairs = PLANS[FIRST].pairs  # all that there are
        scores = {
            name(m): {pair[0]: [run["score"] for run in self.of(m, pair)] for pair in pairs}
            for m in self.tuned
        }
        dense = scores.pop("dense")[pairs[0][0]]
        return plots.accuracy(scores, dense, TASKS[self.task].unit)


def jumps() -> Figure:
    """Draw the losses around a refresh, of the settings that they were written of."""
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for run in json.loads(JUMPS.read_text())["runs"]:
        half = len(run["losses"]) // 2
        axes.plot(range(-half, half), run["losses"], label=name(run["setting"]["method"]))
    axes.set(xlabel="steps after a refresh", ylabel="loss, mean over 30 refreshes")
    axes.set(title=TASKS[run["setting"]["task"]].title)
    axes.grid(alpha=0.2)
    axes.legend()
    return figure


def cell(several: Sequence[Run]) -> str:
    """Return the mean score of runs, its deviation if they are several, and the operations."""
    if not several:
        return ""
    mean, deviation = _spread(several)
    told = f"{mean:.2f} ± {deviation:.2f}" if len(several) > 1 else f"{mean:.2f}"
    return f"{told} ({statistics.mean(run['flops'] for run in several):.2f}×)"


def _spread(several: Sequence[Run]) -> tuple[float, float]:
    """Return mean and standard deviation of the scores of runs; of one it is 0."""
    scores = [run["score"] for run in several]
    return statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0


def shock(setting: Setting, several: Sequence[Run]) -> str:
    """Return the median over runs and refreshes of the shock, and the largest in parentheses."""
    if setting.method.endswith("dense"):
        return "no sets"
    shocks = [run["shock"] for run in several if run.get("shock")]
    if not shocks:
        return "sets of each step" if setting.often else ""
    return f"{statistics.median(s[0] for s in shocks):.2f} ({max(s[1] for s in shocks):.2f})"


def shown(pair: Pair) -> str:
    """Write a pair of sparsities in per cent."""
    return f"{100 * pair[0]:.0f} / {100 * pair[1]:.0f} %"


def name(method: str) -> str:
    """Write the name of a method or a field in words."""
    return method.replace("_", " ")
