"""Transposition of matrices in Numba, a square of vectors at a time.

torch's own copy of a transposed tensor takes four times as long.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from topkast_func.kernels.threads import Kernel, compiled, in_parallel
from topkast_func.kernels.tiles import VECTOR_BYTES
from topkast_func.kernels.vectors import Tile


def transposed(x: Tensor) -> Tensor:
    """Return matrices transposed.

    Args:
        x: [matrices, n, m], float32 or float64.

    Returns:
        [matrices, m, n], contiguous.
    """
    y = x.new_empty(x.shape[0], x.shape[2], x.shape[1])
    in_parallel(_kernel, x.contiguous().numpy(), y.numpy())
    return y


@intrinsic
def _transpose_square(
    typing_context: Any, kind: Any, source: Any, line: Any, target: Any, target_line: Any
) -> Any:
    """Emit target[j, i] = source[i, j] of a square, as wide as a vector; lines in numbers.

    Returns:
        The types, and what emits the code, as Numba asks.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        _, source, line, target, target_line = arguments
        tile = Tile(builder, kind.dtype)

        def at(base: Any, number: int, length: Any) -> Any:
            offset = builder.mul(tile.constant(number), length)
            return tile.at(base, offset, tile.vector, tile.size)

        rows = [tile.load(at(source, i, line)) for i in range(tile.lanes)]
        for i, row in enumerate(tile.transposed(rows)):
            tile.store(row, at(target, i, target_line))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 4), codegen


@lru_cache
def _kernel(threaded: bool) -> Kernel:
    """Return ``kernel(parts, x, y)``."""

    def kernel(parts: int, x: Any, y: Any) -> None:
        matrices, height, width = x.shape
        size, lanes = x.itemsize, VECTOR_BYTES // x.itemsize
        across, whole = -(-height // lanes), width // lanes * lanes
        for part in prange(parts):
            for band in range(
                matrices * across * part // parts, matrices * across * (part + 1) // parts
            ):
                matrix, top = band // across, band % across * lanes
                source = x.ctypes.data + (matrix * height + top) * width * size
                target = y.ctypes.data + (matrix * width * height + top) * size
                squares = whole if top + lanes <= height else 0
                for j in range(0, squares, lanes):
                    at = target + j * height * size
                    _transpose_square(x, source + j * size, np.int64(width), at, np.int64(height))
                for i in range(top, min(top + lanes, height)):
                    for j in range(squares, width):
                        y[matrix, j, i] = x[matrix, i, j]

    return compiled(kernel, threaded)
