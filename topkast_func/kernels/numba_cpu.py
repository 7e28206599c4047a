"""Sparse products on the CPU: tiles of the batch, panels of columns, rows per thread.

Every product walks a tile of the batch, a panel of columns, and the block rows of one thread,
so that the activations it reads stay in the cache; within a block row `simd` keeps the sums
in registers. Rows are shared among threads by the number of stored blocks, and each is
computed by one thread alone, so that results do not depend on how many there are.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from topkast_func.kernels.integers import Integer
from topkast_func.kernels.llvm import Kernel
from topkast_func.kernels.pattern import BlockRows, Pattern, block_of
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
    gradient = torch.zeros_like(values, memory_format=torch.contiguous_format)
    block, (tiles, features, width) = block_of(values), g.shape
    height, active = features // block[0], pattern.active_count * block[0] * block[1]
    panels = (panels_of(part, height) for part in pattern[:2])
    index = (*pattern.forward, *pattern.exploring)
    sizes = (tiles, height, x.shape[1], width, active * x.itemsize, *panels)
    work = values.numel() * tiles * width
    _dots_kernel(block, x.dtype)(*index, g, x, gradient, *sizes, work=work)
    return gradient


def _sums(
    values: Tensor, x: Tensor, part: BlockRows, features: int, places: Tensor | None
) -> Tensor:
    block = block_of(values) if places is None else block_of(values)[::-1]
    tiles, depth, width = x.shape
    y, height = x.new_empty(tiles, features, width), features // block[0]
    index = (*part, part.columns if places is None else places)
    sizes = (tiles, height, depth, width, panels_of(part, height))
    work = part.columns.numel() * block[0] * block[1] * tiles * width
    _rows_kernel(block, places is not None, x.dtype)(*index, values, x, y, *sizes, work=work)
    return y


def panels_of(part: BlockRows, height: int) -> int:
    """Return into how many panels so many block rows are cut."""
    return (part.pointers.shape[0] - 1) // height


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
        tiles: Integer,
        height: Integer,
        depth: Integer,
        width: Integer,
        panels: Integer,
    ) -> None:
        line = width * tile.size
        first, last = share(tile, pointers, panels, height, part, parts)
        with tile.loop(0, tiles) as number:
            of_tile = y + number * height * block[0] * line
            clear(tile, of_tile, first * block[0] * width, last * block[0] * width)
            with segments(tile, pointers, panels, first, last) as (row, begin, end):
                add_rows(
                    tile,
                    of_tile + row * block[0] * line,
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


def clear(tile: Tile, base: Integer, start: Integer | int, end: Integer) -> None:
    """Emit base[start:end] = 0, of whole vectors."""
    with tile.loop(start, end, tile.lanes) as lane:
        tile.store(tile.zero, *tile.beside(base, lane, 1))


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
