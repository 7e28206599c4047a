"""Transposition of matrices, a square of vectors at a time.

Squares are walked in blocks whose lines are whole cache lines, along the longer side: what is
written to one line is written at once, before others that share its place put it out of the cache.
torch's own copy of a transposed tensor takes four times as long.
"""

from functools import cache
from itertools import product

import torch
from torch import Tensor

from topkast_func.kernels.integers import Integer
from topkast_func.kernels.llvm import Kernel
from topkast_func.kernels.vectors import Tile

LINE_BYTES = 64
"""Bytes of a cache line."""


def transposed(x: Tensor) -> Tensor:
    """Return matrices transposed.

    Args:
        x: [matrices, n, m], float32 or float64.

    Returns:
        [matrices, m, n], contiguous.
    """
    y = x.new_empty(x.shape[0], x.shape[2], x.shape[1])
    _kernel(x.dtype)(x, y, *x.shape, work=x.numel())
    return y


@cache
def _kernel(dtype: torch.dtype) -> Kernel:
    """Return the kernel; a part of the work are strips along the longer side, a block wide."""

    def emit(
        tile: Tile,
        part: Integer,
        parts: Integer,
        x: Integer,
        y: Integer,
        matrices: Integer,
        height: Integer,
        width: Integer,
    ) -> None:
        side = max(LINE_BYTES // tile.size, tile.lanes)
        sides = sorted({side, tile.lanes, 1}, reverse=True)
        wide = height.below(width)
        long, short = width.where(wide, height), height.where(wide, width)
        across = (short + side - 1) // side
        strips = matrices * across
        with (
            tile.loop(strips * part // parts, strips * (part + 1) // parts) as strip,
            tile.loop(0, long, side) as along,
        ):
            corner, beside = strip // across * height * width, strip % across * side
            top, left = beside.where(wide, along), along.where(wide, beside)
            bottom, right = _least(top + side, height), _least(left + side, width)
            for columns, column in tile.runs(left, right, sides):
                for rows, row in tile.runs(top, bottom, sides):
                    source = x + (corner + row * width + column) * tile.size
                    target = y + (corner + column * height + row) * tile.size
                    step = tile.lanes if min(rows, columns) > 1 else 1
                    for j, i in product(range(0, columns, step), range(0, rows, step)):
                        here = source + (width * i + j) * tile.size
                        there = target + (height * j + i) * tile.size
                        _square(tile, step, here, there, width, height)

    return Kernel(emit, dtype)


def _square(
    tile: Tile, side: int, source: Integer, target: Integer, line: Integer, target_line: Integer
) -> None:
    """Emit target[j, i] = source[i, j] of a square, a vector or a number wide; lines in numbers."""
    if side == 1:
        place = tile.at(target, 0, tile.scalar, tile.size)
        tile.builder.store(tile.number(source, 0), place)
        return
    rows = [tile.load(*tile.beside(source, line * i, 1)) for i in range(tile.lanes)]
    for i, row in enumerate(tile.transposed(rows)):
        tile.store(row, *tile.beside(target, target_line * i, 1))


def _least(a: Integer, b: Integer) -> Integer:
    return a.where(a.below(b), b)
