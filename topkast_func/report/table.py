"""Tables of text as wide as the terminal, 80 columns where there is none, one line a row."""

import re
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence

SHORTEST = 8
"""Characters that are left of a name at the least."""

LISTED = 4
"""Items of a list that are named."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], last: str = ">") -> str:
    """Lay out a table; names that are too long for it lose their beginning.

    Args:
        head: Titles of the columns.
        rows: Cells of each row, the name first.
        last: How the last column is aligned: "<" or ">".

    Returns:
        Lines of text: names to the left, other columns to the right.
    """
    columns = [*zip(head, *rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    room = max(SHORTEST, _width() - sum(widths[1:]) - len(widths) + 1)
    widths[0] = min(widths[0], room)
    aligned = ["<", *[">"] * (len(widths) - 2), last]
    return "\n".join(
        " ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip((_short(name, room), *cells), aligned, widths, strict=True)
        ).rstrip()
        for name, *cells in (head, *rows)
    )


def paragraph(text: str) -> str:
    """Break a text into lines that are as wide as a table, those after the first indented."""
    return textwrap.fill(text, _width(), subsequent_indent="  ", break_on_hyphens=False)


def families(names: Iterable[str]) -> str:
    """Name parameters, those that differ by numbers alone once: ``layers.*.weight (12)``."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[re.sub(r"\b\d+\b", "*", name)].append(name)
    return some([
        alike[0] if len(alike) == 1 else f"{pattern} ({len(alike)})"
        for pattern, alike in found.items()
    ])


def some(items: Sequence[str]) -> str:
    """List the first few, and say how many more there are."""
    more = len(items) - LISTED
    return ", ".join(items[:LISTED]) + (f" and {more} more" if more > 0 else "")


def in_bytes(number: int) -> str:
    """Return a number of bytes in at most five characters, such as ``15.5k``."""
    size, units = float(number), iter("kMGT")
    unit = ""
    while size >= 999.5:
        size, unit = size / 1000, next(units)
    return f"{size:.3g}{unit}"


def _width() -> int:
    return shutil.get_terminal_size().columns


def _short(name: str, room: int) -> str:
    return name if len(name) <= room else f"…{name[1 - room :]}"
