"""Tables and figures of what was reached, from the results alone."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from benchmarks.evidence.settings import METHODS, PAIRS, SEEDS, Setting, ablations, trials
from benchmarks.tables import markdown
from topkast_func import plots

Runs = Sequence[Mapping[str, Any]]


def best(runs: Runs, settings: Iterable[Setting], sign: int) -> Setting:
    """Return the setting of the best score; the first of those.

    Args:
        runs: What was run.
        settings: All of them were.
        sign: 1 where a higher score is better, −1 where a lower one is.

    Returns:
        The setting.
    """
    return max(settings, key=lambda setting: sign * _score(runs, setting))


def tuned(runs: Runs, task: str, sign: int) -> dict[str, Setting]:
    """Return the best trial of every method.

    Args:
        runs: What was run, all trials among them.
        task: Name of the task.
        sign: 1 where a higher score is better, −1 where a lower one is.

    Returns:
        Settings by method.
    """
    return {method: best(runs, trials(task, method), sign) for method in METHODS}


def scores(runs: Runs, chosen: Setting) -> dict[float, list[float]]:
    """Return the test scores of a method by forward sparsity, seed by seed.

    Args:
        runs: What was run.
        chosen: Its tuned setting.

    Returns:
        Scores; sparsities that were not run are left out.
    """
    found = {forward: _of(runs, chosen, forward, backward) for forward, backward in PAIRS}
    return {
        forward: [run["score"] for run in several] for forward, several in found.items() if several
    }


def table(runs: Runs, chosen: Mapping[str, Setting]) -> str:
    """Return the scores of every method at every sparsity, mean and spread over the seeds.

    Args:
        runs: What was run.
        chosen: The tuned settings by method.

    Returns:
        Markdown; training operations over dense ones behind each score.
    """
    head = ("method", *(f"{100 * f:.0f} / {100 * b:.0f} %" for f, b in PAIRS))
    rows = []
    for method in METHODS:
        cells = [_cell(_of(runs, chosen[method], *pair)) for pair in PAIRS]
        rows.append((method.replace("_", " "), *cells))
    return markdown(head, rows)


def ablation_tables(runs: Runs, chosen: Mapping[str, Setting]) -> str:
    """Return what Top-KAST reaches when one thing at a time changes.

    Args:
        runs: What was run.
        chosen: The tuned settings by method.

    Returns:
        Markdown, one table for each thing.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for name, setting in ablations(chosen):
        if run := find(runs, setting):
            values = groups.setdefault(name, {})
            values.setdefault(str(getattr(setting, name)), []).append(run["score"])
    tables = []
    for name, values in groups.items():
        head = (name.replace("_", " "), *values)
        tables.append(markdown(head, [("score", *map(_spread, values.values()))]))
    return "\n\n".join(tables)


def figure(runs: Runs, chosen: Mapping[str, Setting], ylabel: str) -> Figure:
    """Draw the scores over forward sparsity.

    Args:
        runs: What was run.
        chosen: The tuned settings by method.
        ylabel: What the scores are.

    Returns:
        The figure.
    """
    results = {m.replace("_", " "): scores(runs, s) for m, s in chosen.items() if m != "dense"}
    dense = [score for several in scores(runs, chosen["dense"]).values() for score in several]
    return plots.accuracy(results, dense, ylabel)


def _of(runs: Runs, chosen: Setting, forward: float, backward: float) -> list[Mapping[str, Any]]:
    base = replace(chosen, forward=forward, backward=backward, validate=False)
    found = [find(runs, replace(base, seed=seed)) for seed in SEEDS]
    return [run for run in found if run]


def find(runs: Runs, setting: Setting) -> Mapping[str, Any] | None:
    """Return what a setting came to, if it was run."""
    told = setting.told()
    return next((run for run in runs if run["setting"] == told), None)


def _score(runs: Runs, setting: Setting) -> float:
    run = find(runs, setting)
    if run is None:
        raise ValueError(f"{setting} was not run")
    return float(run["score"])


def _cell(several: list[Mapping[str, Any]]) -> str:
    if not several:
        return ""
    flops = statistics.mean(run["flops"] for run in several)
    return f"{_spread([run['score'] for run in several])} ({flops:.2f}×)"


def _spread(found: list[float]) -> str:
    deviation = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.2f}{deviation}"
