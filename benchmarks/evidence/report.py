"""Tables and figures of what was reached, from the results alone."""

import json
import statistics
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.evidence.settings import FIRST, METHODS, PLANS, Setting, ablations, trials
from benchmarks.evidence.tasks import TASKS
from benchmarks.tables import markdown
from topkast_func.report import plots

Runs = Sequence[Mapping[str, Any]]


def path(folder: Path, task: str) -> Path:
    """Return where the results of a task are kept."""
    return folder / f"evidence_{task}.json"


def load(folder: Path, task: str) -> tuple[Runs, dict[str, Setting]]:
    """Read what was run of a task.

    Args:
        folder: Where the results are.
        task: Its name.

    Returns:
        The runs, and the tuned settings by method.
    """
    runs = json.loads(path(folder, task).read_text())["runs"]
    return runs, tuned(runs, task, carried(folder, task))


def carried(folder: Path, task: str) -> dict[str, Setting] | None:
    """Return what was chosen on the first task, by method; None for that task itself."""
    return None if task == FIRST else load(folder, FIRST)[1]


def tuned(
    runs: Runs, task: str, carried: Mapping[str, Setting] | None = None
) -> dict[str, Setting]:
    """Return the best trial of every method, to be run whole and scored by the test data.

    Args:
        runs: What was run, all trials among them.
        task: Name of the task.
        carried: What was chosen on another task, by method.

    Returns:
        Settings by method; of equal trials the first.
    """
    sign = TASKS[task].sign
    chosen = {
        method: max(settings, key=lambda setting: sign * score(runs, setting))
        for method, settings in trials(task, carried).items()
    }
    return {m: replace(s, validate=False, steps=1.0) for m, s in chosen.items()}


def scores(runs: Runs, chosen: Setting) -> dict[float, list[float]]:
    """Return the test scores of a method by forward sparsity, seed by seed.

    Args:
        runs: What was run.
        chosen: Its tuned setting.

    Returns:
        Scores; sparsities that were not run are left out.
    """
    pairs = PLANS[chosen.task].pairs
    found = {forward: _of(runs, chosen, forward, backward) for forward, backward in pairs}
    return {
        forward: [run["score"] for run in several] for forward, several in found.items() if several
    }


def table(runs: Runs, chosen: Mapping[str, Setting]) -> str:
    """Return the scores of every method at every sparsity, mean and spread over the seeds.

    Args:
        runs: What was run.
        chosen: The tuned settings by method.

    Returns:
        Markdown; behind each score the operations and, if dense runs were made on the same day,
        the time of training over dense ones.
    """
    pairs = PLANS[chosen["dense"].task].pairs
    dense = _of(runs, chosen["dense"], *pairs[0])
    head = ("method", *(f"{100 * f:.0f} / {100 * b:.0f} %" for f, b in pairs))
    rows = []
    for method in METHODS:
        found = [_of(runs, chosen[method], *pair) for pair in pairs]
        cells = [_cell(several, *_time(several, dense)) if several else "" for several in found]
        rows.append((method.replace("_", " "), *cells))
    return markdown(head, rows)


def ablation_table(runs: Runs, chosen: Mapping[str, Setting]) -> str:
    """Return what Top-KAST reaches when one thing at a time changes.

    Args:
        runs: What was run.
        chosen: The tuned settings by method.

    Returns:
        Markdown, a row for each thing; what it is changed to, the score, and in parentheses the
        operations over dense ones.
    """
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for name, setting in ablations(chosen):
        if run := find(runs, setting):
            value = str(getattr(setting, name))
            found.setdefault(name.replace("_", " "), {}).setdefault(value, []).append(run)
    rows = [
        (name, *(f"{value}: {_cell(several)}" for value, several in values.items()))
        for name, values in found.items()
    ]
    width = max(map(len, rows), default=1)
    padded = [(*row, *[""] * (width - len(row))) for row in rows]
    return markdown(("what changes", *[""] * (width - 1)), padded)


def figure(runs: Runs, chosen: Mapping[str, Setting]) -> Figure:
    """Draw the scores over forward sparsity.

    Args:
        runs: What was run.
        chosen: The tuned settings by method.

    Returns:
        The figure.
    """
    results = {m.replace("_", " "): scores(runs, s) for m, s in chosen.items() if m != "dense"}
    dense = [score for several in scores(runs, chosen["dense"]).values() for score in several]
    return plots.accuracy(results, dense, TASKS[chosen["dense"].task].unit)


def _of(runs: Runs, chosen: Setting, forward: float, backward: float) -> list[Mapping[str, Any]]:
    base = replace(chosen, forward=forward, backward=backward)
    found = [find(runs, replace(base, seed=seed)) for seed in PLANS[chosen.task].seeds]
    return [run for run in found if run]


def find(runs: Runs, setting: Setting) -> Mapping[str, Any] | None:
    """Return what a setting came to, if it was run."""
    told = setting.told()
    return next((run for run in runs if run["setting"] == told), None)


def score(runs: Runs, setting: Setting) -> float:
    """Return the score of a setting.

    Args:
        runs: What was run.
        setting: One run of them.

    Returns:
        The score.

    Raises:
        ValueError: It was not run.
    """
    run = find(runs, setting)
    if run is None:
        raise ValueError(f"{setting} was not run")
    return float(run["score"])


def _time(several: Runs, dense: Runs) -> list[float]:
    """Return the median time over that of dense runs, of days that have both; none if none has."""
    days = {run["date"] for run in several} & {run["date"] for run in dense}
    return [_seconds(several, days) / _seconds(dense, days)] if days else []


def _seconds(several: Runs, days: Set[str]) -> float:
    return float(statistics.median(run["seconds"] for run in several if run["date"] in days))


def mean_and_spread(scores: Sequence[float]) -> str:
    """Return the mean of scores and, of several, their standard deviation, as tables show them."""
    deviation = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{deviation}"


def _cell(several: Runs, *ratios: float) -> str:
    scores = mean_and_spread([run["score"] for run in several])
    shown = (statistics.mean(run["flops"] for run in several), *ratios)
    return f"{scores} ({', '.join(f'{r:.2f}×' for r in shown)})"
