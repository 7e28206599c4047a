"""Sparse products on the CPU in Numba: tiles of the batch, panels of columns, rows per thread.

Every product walks a tile of the batch, a panel of columns, and the block rows of one thread,
so that the activations it reads stay in the cache; within a block row `simd` keeps the sums
in registers. Rows are shared among threads by the number of stored blocks, and each is
computed by one thread alone, so that results do not depend on how many there are.
"""

from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from topkast_func.kernels.pattern import BlockRows, Pattern, block_of
from topkast_func.kernels.simd import add_dots, add_rows
from topkast_func.kernels.threads import FAST, Kernel, compiled, in_parallel


def forward(values: Tensor, x: Tensor, pattern: Pattern, features: int) -> Tensor:
    """Return W_A·x of tiles."""
    return rows_times(values, x, pattern.forward, features)


def rows_times(values: Tensor, x: Tensor, rows: BlockRows, features: int) -> Tensor:
    """Return the same of block rows alone."""
    return _sums(values, x, rows, features, None)


def input_gradient(values: Tensor, g: Tensor, pattern: Pattern, features: int) -> Tensor:
    """Return W_Aᵀ·g of tiles."""
    return _sums(values, g, pattern.transposed, features, pattern.places)


def weight_gradient(g: Tensor, x: Tensor, pattern: Pattern, values: Tensor) -> Tensor:
    """Return g·xᵀ of tiles, sampled on B, in the order and shape of ``values``."""
    gradient = torch.zeros_like(values, memory_format=torch.contiguous_format)
    index = [tensor.numpy() for part in pattern[:2] for tensor in part]
    arrays = (_array(tensor) for tensor in (g, x, gradient))
    in_parallel(partial(_dots_kernel, *block_of(values)), *index, *arrays)
    return gradient


def _sums(
    values: Tensor, x: Tensor, part: BlockRows, features: int, places: Tensor | None
) -> Tensor:
    y = x.new_empty(x.shape[0], features, x.shape[2])
    rows, columns = block_of(values) if places is None else block_of(values)[::-1]
    index = (part.pointers, part.columns, part.columns if places is None else places)
    arrays = (_array(tensor) for tensor in (*index, values, x, y))
    in_parallel(partial(_rows_kernel, rows, columns, int(places is not None)), *arrays)
    return y


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().numpy()


@njit(**FAST)
def _share(pointers: Any, panels: int, rows: int, part: int, parts: int) -> int:
    """Return the first block row of ``part`` where ``parts`` share the stored blocks evenly."""
    if part == parts:
        return rows
    sought = np.int64(pointers[rows * panels]) * part // parts
    low, high = 0, rows
    while low < high:
        middle = (low + high) // 2
        if pointers[middle * panels] < sought:
            low = middle + 1
        else:
            high = middle
    return low


@lru_cache
def _rows_kernel(rows: int, columns: int, transposed: int, threaded: bool) -> Kernel:
    """Return ``kernel(parts, pointers, column, place, values, x, y)``."""

    def kernel(
        parts: int, pointers: Any, column: Any, place: Any, values: Any, x: Any, y: Any
    ) -> None:
        tiles, features, width = y.shape
        line, depth, height = width * x.itemsize, x.shape[1], features // rows
        panels = (len(pointers) - 1) // height
        for part in prange(parts):
            first = _share(pointers, panels, height, part, parts)
            last = _share(pointers, panels, height, part + 1, parts)
            for tile in range(tiles):
                y[tile, first * rows : last * rows] = 0
                for panel in range(panels):
                    for row in range(first, last):
                        segment = row * panels + panel
                        add_rows(
                            x,
                            y.ctypes.data + (tile * features + row * rows) * line,
                            x.ctypes.data + tile * depth * line,
                            width,
                            column.ctypes.data,
                            values.ctypes.data,
                            place.ctypes.data,
                            np.int64(pointers[segment]),
                            np.int64(pointers[segment + 1]),
                            rows,
                            columns,
                            transposed,
                        )

    return compiled(kernel, threaded)


@lru_cache
def _dots_kernel(rows: int, columns: int, threaded: bool) -> Kernel:
    """Return ``kernel(parts, *A, *B∖A, g, x, gradient)``, which adds to the gradient."""

    def kernel(
        parts: int,
        active: Any,
        of_active: Any,
        exploring: Any,
        of_exploring: Any,
        g: Any,
        x: Any,
        gradient: Any,
    ) -> None:
        tiles, features, width = g.shape
        line, depth, height = width * x.itemsize, x.shape[1], features // rows
        size = rows * columns * x.itemsize
        for part in prange(parts):
            for pointers, column, offset in (
                (active, of_active, 0),
                (exploring, of_exploring, len(of_active) * size),
            ):
                panels = (len(pointers) - 1) // height
                first = _share(pointers, panels, height, part, parts)
                last = _share(pointers, panels, height, part + 1, parts)
                for tile in range(tiles):
                    for panel in range(panels):
                        for row in range(first, last):
                            segment = row * panels + panel
                            add_dots(
                                x,
                                gradient.ctypes.data + offset,
                                g.ctypes.data + (tile * features + row * rows) * line,
                                x.ctypes.data + tile * depth * line,
                                width,
                                column.ctypes.data,
                                np.int64(pointers[segment]),
                                np.int64(pointers[segment + 1]),
                                rows,
                                columns,
                            )

    return compiled(kernel, threaded)
