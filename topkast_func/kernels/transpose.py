"""Transposition of matrices, a square of vectors at a time.

torch's own copy of a transposed tensor takes four times as long.
"""

from functools import cache

import torch
from torch import Tensor

from topkast_func.kernels.integers import Integer
from topkast_func.kernels.llvm import Kernel
from topkast_func.kernels.vectors import Tile


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
    """Return the kernel; a part of the work are bands of rows, as many as a vector is wide."""

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
        across, whole = (height + tile.lanes - 1) // tile.lanes, width - width % tile.lanes
        bands = matrices * across
        with tile.loop(bands * part // parts, bands * (part + 1) // parts) as band:
            top = band % across * tile.lanes
            corner = band // across * height * width
            source = x + (corner + top * width) * tile.size
            target = y + (corner + top) * tile.size
            below = top + tile.lanes
            squares = tile.integer(0).where(height.below(below), whole)
            with tile.loop(0, squares, tile.lanes) as column:
                here = source + column * tile.size, target + column * height * tile.size
                _square(tile, *here, width, height)
            rows = height.where(height.below(below), below) - top
            with tile.loop(0, rows) as i, tile.loop(squares, width) as j:
                number = tile.number(source, i * width + j)
                tile.builder.store(number, tile.at(target, j * height + i, tile.scalar, tile.size))

    return Kernel(emit, dtype)


def _square(
    tile: Tile, source: Integer, target: Integer, line: Integer, target_line: Integer
) -> None:
    """Emit target[j, i] = source[i, j] of a square, as wide as a vector; lines in numbers."""
    rows = [tile.load(*tile.beside(source, line * i, 1)) for i in range(tile.lanes)]
    for i, row in enumerate(tile.transposed(rows)):
        tile.store(row, *tile.beside(target, target_line * i, 1))
