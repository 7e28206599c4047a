"""Figures, drawn from results alone."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.multiplication import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from benchmarks.reading import Results
from benchmarks.record import Entry
from benchmarks.steps import DENSE, NETWORKS, ONEDNN

COLORS = {
    "dense": "#222222",
    "dense compiled": "#777777",
    "dense compiled, optimiser too": "#aaaaaa",
    "dense oneDNN": "#8c510a",
    "torch CSR": "#9467bd",
    "torch-sparse": "#c51b7d",
    "SparseLab": "#2ca02c",
    "topkast 1×1": "#1f4e79",
    "topkast 1×1, B = A": "#6baed6",
    "topkast 4×1": "#e6550d",
    "topkast 1×4": "#fdae6b",
    "topkast 4×4": "#d62728",
    "topkast 8×8": "#ff9896",
    "topkast 16×16": "#e377c2",
}


def save(results: Results, folder: Path) -> list[Path]:
    """Draw and save every figure for which there are results.

    Args:
        results: What was measured.
        folder: Where the pictures go; it is made.

    Returns:
        The pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"steps": steps, "products": products}
    paths = []
    for suite, draw in drawn.items():
        if results.cases(suite):
            paths.append(folder / f"{suite}.png")
            draw(results).savefig(paths[-1], dpi=120)
    return paths


def steps(results: Results) -> Figure:
    """Draw the time of a step over forward sparsity, beside the dense lines.

    The dotted vertical line is where unstructured sparsity begins to win.

    Args:
        results: With the suite "steps".

    Returns:
        The figure, one panel for each network.
    """
    networks = [n for n in NETWORKS if list(results.of("steps", f"{n}, sparsities"))]
    figure, axes = _panels(1, len(networks), "steps", results)
    for panel, network in zip(axes, networks, strict=True):
        _network(panel, results, network)
    _legend(figure, axes)
    return figure


def products(results: Results) -> Figure:
    """Draw the speed of each product over torch's dense one, over sparsity.

    Args:
        results: With the suite "products".

    Returns:
        The figure: products down, shapes across.
    """
    kinds, cases = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT), results.cases("products")
    figure, axes = _panels(len(kinds), len(cases), "products", results)
    panels = iter(axes)
    for kind in kinds:
        for case in cases:
            _product(next(panels), results, case, kind)
    _legend(figure, axes)
    return figure


def crossover(points: Sequence[tuple[float, float]], dense: float) -> float | None:
    """Find the sparsity from which on steps are faster than dense ones.

    Args:
        points: (sparsity, time), ascending in sparsity.
        dense: Time of the fastest dense step.

    Returns:
        The sparsity, by interpolation of the logarithm of time; the lowest measured one if
        that wins already; None if the highest does not win.
    """
    if not points or points[-1][1] >= dense:
        return None
    last_loss = max((i for i, (_, time) in enumerate(points) if time >= dense), default=None)
    if last_loss is None:
        return points[0][0]
    (low, slow), (high, fast) = points[last_loss : last_loss + 2]
    share = math.log(slow / dense) / math.log(slow / fast)
    return low + share * (high - low)


def _network(axes: Axes, results: Results, network: str) -> None:
    case = f"{network}, sparsities"
    entries = [e for c in (case, f"{network}, blocks") for e in results.of("steps", c, "step")]
    for series, points in _series(entries, "forward_sparsity").items():
        xs, ys = [100 * s for s, _ in points], [1e3 * time for _, time in points]
        axes.plot(xs, ys, "o-", color=COLORS.get(series), label=series)
    for way in (*DENSE, ONEDNN):
        median = results.median("steps", case, "step", way)
        if median is not None:
            axes.axhline(1e3 * median, color=COLORS[way], linestyle="--", label=way)
    axes.set(title=network, xlabel="forward sparsity, %", ylabel="step, ms", yscale="log")
    _mark_crossover(axes, results, case)


def _mark_crossover(axes: Axes, results: Results, case: str) -> None:
    series = _series(results.of("steps", case, "step"), "forward_sparsity")
    points, dense = series.get("topkast 1×1", []), results.median("steps", case, "step", *DENSE)
    found = None if dense is None else crossover(points, dense)
    if found is not None:
        axes.axvline(100 * found, color=COLORS["topkast 1×1"], linestyle=":", linewidth=1)
        bound = "≤ " if found == points[0][0] else ""
        axes.annotate(
            f"wins from {bound}{found:.0%}",
            (100 * found, 0.02),
            xycoords=axes.get_xaxis_transform(),
            rotation=90,
            fontsize="small",
        )


def _product(axes: Axes, results: Results, case: str, kind: str) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for task in results.tasks("products", case):
        for entry in results.of("products", case, task):
            ratio = results.ratio("products", case, task, ["dense"], [entry.arm])
            if entry.parameters.get("product") == kind and ratio is not None:
                curves.setdefault(entry.arm, []).append((entry.parameters["sparsity"], ratio))
    for arm, points in curves.items():
        style = "--" if arm.startswith("dense") else "o-"
        xs, ys = [100 * s for s, _ in points], [ratio for _, ratio in points]
        axes.plot(xs, ys, style, color=COLORS.get(arm), label=arm)
    axes.set(title=f"{kind}, {case}", xlabel="sparsity, %", yscale="log")
    axes.set_ylabel("speed-up over torch's dense")


def _series(entries: Any, axis: str) -> dict[str, list[tuple[float, float]]]:
    """Group the medians of entries into curves over a parameter that they have."""
    curves: dict[str, list[tuple[float, float]]] = {}
    entry: Entry
    for entry in entries:
        if axis in entry.parameters and entry.median is not None:
            point = (entry.parameters[axis], entry.median)
            curves.setdefault(entry.parameters["series"], []).append(point)
    return {series: sorted(points) for series, points in curves.items()}


def _panels(rows: int, columns: int, suite: str, results: Results) -> tuple[Figure, list[Axes]]:
    size = (4.6 * max(columns, 1), 3.6 * rows + 1.2)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    about = results.about[suite]
    machine = about["machine"]["cpu"]
    torch = about["versions"]["torch"]
    figure.suptitle(f"{machine}, {about['threads']} threads, torch {torch}, {about['date']}")
    return figure, list(axes.flat)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    handles = {}
    for axes in panels:
        axes.grid(True, which="both", alpha=0.2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
        found, labels = axes.get_legend_handles_labels()
        handles.update(dict(zip(labels, found, strict=True)))
    order = sorted(handles, key=lambda label: [*COLORS, label].index(label))
    figure.legend([handles[label] for label in order], order, loc="outside lower center", ncols=5)
