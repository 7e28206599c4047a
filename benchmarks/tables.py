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
    """Return the table of targets, then one table for every case.

    Args:
        results: What was measured.

    Returns:
        Markdown.
    """
    return "\n\n".join([target_table(results), *case_tables(results)])


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
