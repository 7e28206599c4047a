"""Sparse products on the CPU: tiles of the batch, panels of columns, rows per thread.

Every product walks a tile of the batch, a panel of columns, and the block rows of one thread,
so that the activations it reads stay in the cache; within a block row `simd` keeps the sums
in registers. Rows are shared among threads by the number of stored blocks, and each is
computed by one thread alone, so that results do not depend on how many there are.
"""

import threading
from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from topkast_func.kernels.integers import Integer
from topkast_func.kernels.llvm import Kernel
from topkast_func.kernels.pattern import BlockRows, Pattern, block_of
from topkast_func.kernels.rows import panels_of, scratch_for, segments, share, summed, summed_in
from topkast_func.kernels.simd import add_dots, add_rows
from topkast_func.kernels.vectors import Tile


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
    gradient = values.new_zeros(values.shape, dtype=summed_in(x.dtype))
    block, (tiles, features, width) = block_of(values), g.shape
    height, active = features // block[0], pattern.active_count * block[0] * block[1]
    panels = (panels_of(part, height) for part in pattern[:2])
    index = (*pattern.forward, *pattern.exploring)
    sizes = (tiles, height, x.shape[1], width, active * gradient.itemsize, *panels)
    work = values.numel() * tiles * width
    _dots_kernel(block, x.dtype)(*index, g, x, gradient, *sizes, work=work)
    return gradient.to(values.dtype)


def _sums(
    values: Tensor, x: Tensor, part: BlockRows, features: int, places: Tensor | None
) -> Tensor:
    block = block_of(values) if places is None else block_of(values)[::-1]
    tiles, depth, width = x.shape
    y, height = x.new_empty(tiles, features, width), features // block[0]
    sums = scratch_for(y)
    index = (*part, part.columns if places is None else places)
    sizes = (tiles, height, depth, width, panels_of(part, height))
    work = part.columns.numel() * block[0] * block[1] * tiles * width
    _rows_kernel(block, places is not None, x.dtype)(*index, values, x, y, sums, *sizes, work=work)
    return y


@cache
def prepare(block: tuple[int, int], dtype: torch.dtype) -> threading.Thread:
    """Begin to make the kernels of a layer, which takes LLVM a moment, in a thread of its own."""
    return making((
        _rows_kernel(block, False, dtype),
        _rows_kernel(block[::-1], True, dtype),
        _dots_kernel(block, dtype),
    ))


def making(kernels: Sequence[Kernel]) -> threading.Thread:
    """Begin to make kernels in a thread, and return it."""
    thread = threading.Thread(target=lambda: [kernel.made() for kernel in kernels])
    thread.start()
    return thread


@cache
def _rows_kernel(block: tuple[int, int], swapped: bool, dtype: torch.dtype) -> Kernel:
    """Return the kernel that sums block rows; it reads values at places where they are swapped."""

    def emit(
        tile: Tile,
        part: Integer,
        parts: Integer,
        pointers: Integer,
        column: Integer,
        place: Integer,
        values: Integer,
        x: Integer,
        y: Integer,
        scratch: Integer,
        tiles: Integer,
        height: Integer,
        depth: Integer,
        width: Integer,
        panels: Integer,
    ) -> None:
        line = width * tile.size
        first, last = share(tile, pointers, panels, height, part, parts)
        rows = first * block[0], last * block[0]
        with tile.loop(0, tiles) as number:
            of_tile = y + number * height * block[0] * line
            with (
                summed(tile, of_tile, scratch, rows, width, width) as sums,
                segments(tile, pointers, panels, first, last) as (row, begin, end),
            ):
                add_rows(
                    tile,
                    sums + row * (block[0] * tile.wide.size) * width,
                    x + number * depth * line,
                    width,
                    lambda k: tile.index(column, k) * (block[1] * width),
                    values,
                    place if swapped else None,
                    begin,
                    end,
                    block,
                )

    return Kernel(emit, dtype)


@cache
def _dots_kernel(block: tuple[int, int], dtype: torch.dtype) -> Kernel:
    """Return the kernel that adds the products of rows to a gradient, first on A, then on B∖A."""

    def emit(
        tile: Tile,
        part: Integer,
        parts: Integer,
        active: Integer,
        of_active: Integer,
        exploring: Integer,
        of_exploring: Integer,
        g: Integer,
        x: Integer,
        gradient: Integer,
        tiles: Integer,
        height: Integer,
        depth: Integer,
        width: Integer,
        beyond: Integer,
        active_panels: Integer,
        exploring_panels: Integer,
    ) -> None:
        line = width * tile.size

        def start_of(column: Integer, k: Integer) -> Integer:
            return tile.index(column, k) * (block[1] * width)

        for pointers, column, panels, here in (
            (active, of_active, active_panels, gradient),
            (exploring, of_exploring, exploring_panels, gradient + beyond),
        ):
            first, last = share(tile, pointers, panels, height, part, parts)
            with (
                tile.loop(0, tiles) as number,
                segments(tile, pointers, panels, first, last) as (row, begin, end),
            ):
                add_dots(
                    tile,
                    here,
                    g + (number * height + row) * block[0] * line,
                    x + number * depth * line,
                    width,
                    partial(start_of, column),
                    begin,
                    end,
                    block,
                )

    return Kernel(emit, dtype)
