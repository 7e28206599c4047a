"""Committed results, read for tables and figures; ratios are taken within one case."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import Entry, read
from benchmarks.suites import SUITES


class Results(NamedTuple):
    """What was measured.

    Attributes:
        about: Circumstances by suite.
        entries: All entries.
    """

    about: dict[str, dict[str, Any]]
    entries: list[Entry]

    def of(self, suite: str, case: str, task: str | None = None) -> Iterator[Entry]:
        """Yield the entries of a case, or of one task of it."""
        for entry in self.entries:
            if (entry.suite, entry.case) == (suite, case) and task in {None, entry.task}:
                yield entry

    def cases(self, suite: str) -> list[str]:
        """Name the cases of a suite."""
        return list(dict.fromkeys(e.case for e in self.entries if e.suite == suite))

    def tasks(self, suite: str, case: str) -> list[str]:
        """Name the tasks of a case."""
        return list(dict.fromkeys(e.task for e in self.of(suite, case)))

    def median(self, suite: str, case: str, task: str, *arms: str) -> float | None:
        """Return the smallest median among arms; None where none of them has any."""
        medians = [e.median for e in self.of(suite, case, task) if e.arm in arms]
        return min((median for median in medians if median is not None), default=None)

    def ratio(
        self, suite: str, case: str, task: str, over: Iterable[str], arms: Iterable[str]
    ) -> float | None:
        """Return how many times the best of ``over`` is the best of ``arms``; None without both."""
        above = self.median(suite, case, task, *over)
        below = self.median(suite, case, task, *arms)
        return above / below if above is not None and below else None


def load(folder: Path) -> Results:
    """Read the results that a folder has.

    Args:
        folder: Where the JSON files are.

    Returns:
        The results of the suites that are there.
    """
    paths = {suite: folder / f"{suite}.json" for suite in SUITES}
    found = {suite: read(path) for suite, path in paths.items() if path.exists()}
    about = {suite: circumstances for suite, (circumstances, _) in found.items()}
    return Results(about, [entry for _, entries in found.values() for entry in entries])
