"""Block rows of one thread: which they are, how they are walked, and where their sums are kept."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from topkast_func.kernels.halves import HalfTile
from topkast_func.kernels.integers import Integer
from topkast_func.kernels.pattern import BlockRows
from topkast_func.kernels.vectors import Tile


def summed_in(dtype: torch.dtype) -> torch.dtype:
    """Return in what sums of products are kept: float32 for bfloat16."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def scratch_for(y: Tensor) -> Tensor:
    """Return where `summed` keeps the sums of a tile of results, [tiles, rows, length]."""
    return y if summed_in(y.dtype) == y.dtype else y.new_empty(y.shape[1:], dtype=torch.float32)


def panels_of(part: BlockRows, height: int) -> int:
    """Return into how many panels so many block rows are cut."""
    return (part.pointers.shape[0] - 1) // max(1, height)


@contextmanager
def summed(
    tile: Tile,
    y: Integer,
    scratch: Integer,
    rows: tuple[Integer, Integer],
    length: Integer,
    width: Integer,
) -> Iterator[Integer]:
    """Start sums of rows at zero, and store them in the rows of y at the end.

    Args:
        tile: What emits.
        y: The first row of results.
        scratch: Rows of as many numbers in float32, where sums of half precision are kept.
        rows: The first row, and the one after the last.
        length: Numbers from one row to the next.
        width: Numbers of a row, whole vectors.

    Yields:
        The first row of sums.
    """
    wide = tile.wide
    sums = scratch if isinstance(tile, HalfTile) else y
    with tile.loop(*rows) as row, tile.loop(0, width, wide.lanes) as lane:
        wide.store(wide.zero, *wide.beside(sums, row * length + lane, 1))
    yield sums
    if isinstance(tile, HalfTile):
        with tile.loop(*rows) as row, tile.loop(0, width, tile.lanes) as lane:
            place = row * length + lane
            rounded = tile.rounded(*map(wide.load, wide.beside(sums, place, tile.taken)))
            tile.store(rounded, *tile.beside(y, place, 1))


@contextmanager
def segments(
    tile: Tile, pointers: Integer, panels: Integer, first: Integer, last: Integer
) -> Iterator[tuple[Integer, Integer, Integer]]:
    """Walk block rows, panel by panel.

    Args:
        tile: What emits.
        pointers: Those of the block rows.
        panels: Into how many panels these are cut.
        first: The first block row.
        last: The one after the last.

    Yields:
        A block row, and where its stored blocks in a panel begin and end.
    """
    with tile.loop(0, panels) as panel, tile.loop(first, last) as row:
        segment = row * panels + panel
        yield row, tile.index(pointers, segment), tile.index(pointers, segment + 1)


def share(
    tile: Tile, pointers: Integer, panels: Integer, rows: Integer, part: Integer, parts: Integer
) -> tuple[Integer, Integer]:
    """Return the first block row of a part, and that of the next; stored blocks are shared evenly.

    They are found by bisection: [low, high) holds the first row that so many blocks come before.

    Args:
        tile: What emits.
        pointers: Of `BlockRows`.
        panels: Panels of each block row.
        rows: Block rows.
        part: Number of the part.
        parts: How many there are.

    Returns:
        Both.
    """
    stored, ends = tile.index(pointers, rows * panels), []
    for number in (part, part + 1):
        low, high = tile.variable(0), tile.variable(rows)
        with tile.loop(0, 32):
            middle = (low() + high()) // 2
            before = tile.index(pointers, middle * panels).below(stored * number // parts)
            low.set((middle + 1).where(before, low()))
            high.set(high().where(before, middle))
        ends.append(low().where(number.below(parts), rows))
    return ends[0], ends[1]
