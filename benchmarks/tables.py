"""Results as tables in Markdown."""

from collections.abc import Iterable, Iterator, Sequence

from benchmarks.reading import Results
from benchmarks.record import Entry
from benchmarks.steps import DENSE as DENSE_STEPS
from benchmarks.steps import ONEDNN
from benchmarks.targets import targets

UNITS = {"s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")), "bytes": ((1e6, "MB"), (1e3, "kB"))}
BASELINES = (*DENSE_STEPS, "copy", "step")


def every_table(results: Results) -> str:
    """Return the overview, the table of targets, then one table for every case.

    Args:
        results: What was measured.

    Returns:
        Markdown.
    """
    return "\n\n".join([overview(results), target_table(results), *case_tables(results)])


def overview(results: Results) -> str:
    """Return the table of the README: one row for each network, times and ratios.

    Args:
        results: With the suite "steps".

    Returns:
        A table in Markdown.
    """
    head = ("network", "dense", *(title for title, _, _ in COLUMNS))
    return markdown(head, [_overview_row(results, *named) for named in NAMES.items()])


def _overview_row(results: Results, network: str, name: str) -> tuple[str, ...]:
    dense = results.median("steps", f"{network}, sparsities", "step", *DENSE_STEPS)
    cells = [name, "" if dense is None else _measure(dense, "s")]
    for _, case, arm in COLUMNS:
        where = ("steps", f"{network}, {case}", "step")
        median, ratio = results.median(*where, arm), results.ratio(*where, DENSE_STEPS, [arm])
        known = median is not None and ratio is not None
        cells.append(f"{_measure(median or 0.0, 's')}, {ratio:.1f}×" if known else "")
    return tuple(cells)


NAMES = {
    "mlp-784": "784-512-512-10, batch 128",
    "mlp-1024": "1024, four layers, batch 256",
    "mlp-2048": "2048, three layers, batch 512",
    "encoder": "transformer block, 16 × 64 tokens of 256",
}
COLUMNS = (
    ("80/50", "sparsities", "topkast 1×1 80/50"),
    ("90/80", "sparsities", "topkast 1×1 90/80"),
    ("95/90", "sparsities", "topkast 1×1 95/90"),
    ("90/90", "sparsities", "topkast 1×1 90/90"),
    ("90/80 in 4×4 blocks", "blocks", "topkast 4×4 90/80"),
    ("SparseLab 0.2.2, 90/90", "sparsities", "SparseLab 90/90"),
)
"""Columns of the overview: title, case and arm."""


def target_table(results: Results) -> str:
    """Return what was to be reached and what is.

    Args:
        results: What was measured.

    Returns:
        A table in Markdown.
    """
    rows = [
        (
            target.what,
            _formatted(target.floor, target.shown),
            _formatted(target.aim, target.shown),
            _formatted(target.measured(results), target.shown),
            _formatted(target.beside_onednn(results), target.shown),
            target.verdict(results),
        )
        for target in targets()
    ]
    return markdown(("", "at least", "aim", "measured", "over oneDNN's dense", "reached"), rows)


def case_tables(results: Results) -> Iterator[str]:
    """Yield a table for each case: arms down, tasks across, with ratios to the case's baseline.

    Args:
        results: What was measured.

    Yields:
        Tables in Markdown, with a heading.
    """
    for suite in results.about:
        for case in results.cases(suite):
            yield f"#### {suite}: {case}\n\n{_case_table(results, suite, case)}"


def _case_table(results: Results, suite: str, case: str) -> str:
    tasks = [task for task in results.tasks(suite, case) if task] or [""]
    arms: dict[str, list[Entry]] = {}
    for entry in results.of(suite, case):
        arms.setdefault(entry.arm, []).append(entry)
    rows = []
    for arm, entries in arms.items():
        by_task = {entry.task: entry for entry in entries}
        by_task.setdefault(tasks[0], entries[0])  # where it failed at once, say so once
        rows.append((arm, *(_cell(results, by_task.get(task)) for task in tasks)))
    return markdown(("", *tasks), rows)


def _cell(results: Results, entry: Entry | None) -> str:
    """Write a median, and how many times faster (or smaller) than the baselines it is."""
    if entry is None:
        return ""
    if entry.median is None:
        return f"failed: {entry.error}".replace("|", "/")
    where = (entry.suite, entry.case, entry.task)
    ratios = [
        results.ratio(*where, over, [entry.arm])
        for over in (BASELINES, [ONEDNN])
        if entry.arm not in BASELINES
    ]
    told = ", ".join(f"{ratio:.2f}×" for ratio in ratios if ratio is not None)
    return _measure(entry.median, entry.unit) + (f" ({told})" if told else "")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table.

    Args:
        head: Titles of the columns.
        rows: Cells, row by row.

    Returns:
        Markdown; the first column to the left, the others to the right.
    """
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _formatted(number: float | None, form: str) -> str:
    return "" if number is None else form.format(number)


def _measure(number: float, unit: str) -> str:
    """Write a number in the largest unit in which it is at least one."""
    scales = UNITS[unit]
    scale, name = next((s for s in scales if number >= s[0]), scales[-1])
    return f"{number / scale:.3g} {name}"
