"""Results as tables in Markdown and as figures."""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.products import KINDS, ONEDNN
from benchmarks.record import Entry, Results, median, spread
from benchmarks.steps import DENSE, NETWORKS, PAIRS

Curves: TypeAlias = dict[str, dict[float, float]]  # by name a number at each sparsity

UNITS = {"s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")), "bytes": ((1e6, "MB"), (1e3, "kB"))}
BASELINES = {  # over which arms there are ratios, by suite
    "products": (["dense"], [ONEDNN]),
    "steps": (DENSE, [ONEDNN]),
    **dict.fromkeys(("loops", "halves"), (DENSE,)),
    "memory": (["dense"],),
    "refresh": (["copy", "step"],),
    **dict.fromkeys(("ranks", "ranks_seconds"), (["DDP"], ["FSDP2"])),
}
COLUMNS = {  # of the short table of steps: cases of a network, and arms
    **{pair: ("sparsities", f"topkast 1×1 {pair}") for pair in ("80/50", "90/80", "95/90")},
    "90/80 in 4×4 blocks": ("blocks", "topkast 4×4 90/80"),
}


def steps(results: Results) -> str:
    """Return how many times as fast as the fastest dense one the step of each network is."""
    rows = []
    for network, title in NETWORKS.items():
        named = [(f"{network}, {case}", "step", DENSE, arm) for case, arm in COLUMNS.values()]
        ratios = [results.ratio("steps", *where) for where in named]
        rows.append((title, *("" if math.isnan(ratio) else f"{ratio:.1f}×" for ratio in ratios)))
    return markdown(("network", *COLUMNS), rows)


def case(results: Results, suite: str, name: str, only: str = "") -> str:
    """Return a case: arms down, across the tasks whose name ends as asked."""
    cells = {(e["arm"], e["task"]): _cell(results, e) for e in results.of(suite, name)}
    arms, tasks = (dict.fromkeys(names) for names in zip(*cells, strict=True))
    told = [task for task in tasks if task and task.endswith(only)]  # an arm that failed has none
    rows = [(a, *(cells.get((a, t), cells.get((a, ""), "")) for t in told)) for a in arms]
    return markdown((name, *told), rows)


def _cell(results: Results, entry: Entry) -> str:
    """Write a median, its spread, and how many times faster (or smaller) than baselines it is."""
    number, apart = median(entry), spread(entry)
    if math.isnan(number):
        return f"failed: {entry['error']}".replace("|", "/")
    scales = UNITS[entry["unit"]]
    scale, unit = next((s for s in scales if number >= s[0]), scales[-1])
    where, over = (entry["suite"], entry["case"], entry["task"]), BASELINES.get(entry["suite"], ())
    known = any(entry["arm"] in arms for arms in over)
    ratios = [] if known else [results.ratio(*where, arms, entry["arm"]) for arms in over]
    told = ", ".join(f"{ratio:.2f}×" for ratio in ratios if not math.isnan(ratio))
    shown = f"{number / scale:.3g} {unit}" + (f" ± {apart:.0%}" if apart else "")
    return f"{shown} ({told})" if told else shown


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table, the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def steps_figure(results: Results) -> Figure:
    """Draw the time of a step over forward sparsity, a panel for each network."""
    panels: dict[str, Curves] = {network: {} for network in NETWORKS}
    for network, curves in panels.items():
        kinds = (results.of("steps", f"{network}, {k}", "step") for k in ("blocks", "sparsities"))
        for entry in chain(*kinds):
            told, number = entry["parameters"], 1e3 * median(entry)
            if "forward_sparsity" in told:
                curves.setdefault(told["series"], {})[told["forward_sparsity"]] = number
            else:
                curves[entry["arm"]] = {forward: number for forward, _ in PAIRS}
    return _figure(panels, "step, ms", results.where("steps"))


def products_figure(results: Results) -> Figure:
    """Draw how many times as fast as torch's dense product each is, a panel for each product."""
    case, panels = "1024x1024/256", dict[str, Curves]((kind, {}) for kind in KINDS)
    for entry in results.of("products", case):
        kind, _, sparsity = entry["task"].rpartition(" ")
        ratio = results.ratio("products", case, entry["task"], ["dense"], entry["arm"])
        panels[kind].setdefault(entry["arm"], {})[int(sparsity[:-1]) / 100] = ratio
    return _figure(panels, "times as fast as dense", f"{case}, {results.where('products')}")


def _figure(panels: dict[str, Curves], ylabel: str, title: str) -> Figure:
    size = (4.2 * len(panels), 4.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
    figure.suptitle(title)
    names = dict.fromkeys(name for curves in panels.values() for name in curves)
    colors = {name: plt.get_cmap("tab20")(place) for place, name in enumerate(names)}
    handles: dict[str, Any] = {}
    for panel, (name, curves) in zip(axes, panels.items(), strict=True):
        for label, points in curves.items():
            xs, style = sorted(points), "--" if label.startswith("dense") else "o-"
            ys = [points[x] for x in xs]
            (handles[label],) = panel.plot([100 * x for x in xs], ys, style, color=colors[label])
        panel.set(title=name, xlabel="forward sparsity, %", ylabel=ylabel, yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
        panel.grid(True, which="both", alpha=0.2)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    return figure
