"""Sparse convolutions on the CPU: the products of `numba_cpu`, of rows read from shifted places.

Loops and sums are the same; rows are walked in strips, and what a tap multiplies is found by a
table. So did Park and others (2017), "Faster CNNs with direct sparse convolutions and guided
pruning", for inference.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from topkast_func.kernels.integers import Integer
from topkast_func.kernels.llvm import Kernel
from topkast_func.kernels.numba_cpu import making
from topkast_func.kernels.rows import panels_of, scratch_for, segments, share, summed, summed_in
from topkast_func.kernels.shifted import Shifted
from topkast_func.kernels.simd import add_dots, add_rows
from topkast_func.kernels.vectors import Tile

STRIP = 16
"""Vectors of a row that are walked at a time, so that those of a panel stay in the cache."""

ENTRIES = (1, 1)
"""The blocks of a kernel: sets of convolutions on the kernels are of entries."""


def forward(values: Tensor, x: Tensor, sets: Shifted, features: int) -> Tensor:
    """Return the outputs of tiles."""
    pattern, starts, lead = sets
    y = x.new_empty(x.shape[0], features, x.shape[2])
    sizes = (x.shape[0], features, x.shape[1], x.shape[2], lead)
    part = pattern.forward
    tensors = (*part, starts, values, x, y, scratch_for(y))
    _forward_kernel(x.dtype)(*tensors, *sizes, panels_of(part, features))
    return y


def input_gradient(values: Tensor, g: Tensor, sets: Shifted, features: int) -> Tensor:
    """Return the gradient of so many rows."""
    pattern, starts, lead = sets
    x = g.new_empty(g.shape[0], features, g.shape[2])
    sizes = (g.shape[0], g.shape[1], features, g.shape[2], lead, *starts.shape)
    part = pattern.transposed
    tensors = (*part, pattern.places, starts, values, g, x, scratch_for(x))
    _input_kernel(g.dtype)(*tensors, *sizes, panels_of(part, starts.numel()))
    return x


def weight_gradient(g: Tensor, x: Tensor, sets: Shifted, values: Tensor) -> Tensor:
    """Return the gradient of the values, in their order."""
    pattern, starts, lead = sets
    gradient = values.new_zeros(values.shape, dtype=summed_in(x.dtype))
    height = g.shape[1]
    panels = (panels_of(part, height) for part in pattern[:2])
    index = (*pattern.forward, *pattern.exploring, starts)
    sizes = (*g.shape[:2], *x.shape[1:], lead, pattern.active_count * gradient.itemsize, *panels)
    _dots_kernel(x.dtype)(*index, g, x, gradient, *sizes)
    return gradient.to(values.dtype)


@cache
def prepare(block: tuple[int, int], dtype: torch.dtype) -> threading.Thread:
    """Begin to make the kernels, see `numba_cpu.prepare`."""
    return making([_forward_kernel(dtype), _input_kernel(dtype), _dots_kernel(dtype)])


@cache
def _forward_kernel(dtype: torch.dtype) -> Kernel:
    """Return the kernel of outputs; a part of the work are rows of them."""

    def emit(
        tile: Tile,
        part: Integer,
        parts: Integer,
        pointers: Integer,
        column: Integer,
        starts: Integer,
        values: Integer,
        x: Integer,
        y: Integer,
        scratch: Integer,
        tiles: Integer,
        height: Integer,
        depth: Integer,
        length: Integer,
        lead: Integer,
        panels: Integer,
    ) -> None:
        line, wide_line = length * tile.size, length * tile.wide.size
        first, last = share(tile, pointers, panels, height, part, parts)
        with tile.loop(0, tiles) as number, _strips(tile, length - lead) as (strip, width):
            outputs = y + number * height * line + (lead + strip) * tile.size
            inputs = x + number * depth * line + strip * tile.size
            with (
                summed(tile, outputs, scratch, (first, last), length, width) as sums,
                segments(tile, pointers, panels, first, last) as (row, begin, end),
            ):
                add_rows(
                    tile,
                    sums + row * wide_line,
                    inputs,
                    width,
                    lambda k: tile.index(starts, tile.index(column, k)),
                    values,
                    None,
                    begin,
                    end,
                    ENTRIES,
                )

    return Kernel(emit, dtype)


@cache
def _input_kernel(dtype: torch.dtype) -> Kernel:
    """Return the kernel of the gradient of rows; a part of the work are channels."""

    def emit(
        tile: Tile,
        part: Integer,
        parts: Integer,
        pointers: Integer,
        output: Integer,
        place: Integer,
        starts: Integer,
        values: Integer,
        g: Integer,
        x: Integer,
        scratch: Integer,
        tiles: Integer,
        height: Integer,
        depth: Integer,
        length: Integer,
        lead: Integer,
        channels: Integer,
        taps: Integer,
        panels: Integer,
    ) -> None:
        line, wide_line, rows = length * tile.size, length * tile.wide.size, depth // channels
        first, last = share(tile, pointers, panels * taps, channels, part, parts)
        with tile.loop(0, tiles) as number, _strips(tile, length - lead) as (strip, width):
            inputs = x + number * depth * line + strip * tile.size
            gradients = g + number * height * line + (lead + strip) * tile.size
            own = first * rows, last * rows
            with (
                summed(tile, inputs, scratch, own, length, width) as sums,
                tile.loop(first * taps, last * taps) as tap,
            ):
                start = tile.index(starts, tap)
                with segments(tile, pointers, panels, tap, tap + 1) as (_, begin, end):
                    add_rows(
                        tile,
                        sums + start // length * wide_line,
                        gradients - start % length * tile.size,
                        width,
                        lambda k: tile.index(output, k) * length,
                        values,
                        place,
                        begin,
                        end,
                        ENTRIES,
                    )

    return Kernel(emit, dtype)


@cache
def _dots_kernel(dtype: torch.dtype) -> Kernel:
    """Return the kernel of the gradient of values, first on A, then on B∖A."""

    def emit(
        tile: Tile,
        part: Integer,
        parts: Integer,
        active: Integer,
        of_active: Integer,
        exploring: Integer,
        of_exploring: Integer,
        starts: Integer,
        g: Integer,
        x: Integer,
        gradient: Integer,
        tiles: Integer,
        height: Integer,
        depth: Integer,
        length: Integer,
        lead: Integer,
        beyond: Integer,
        active_panels: Integer,
        exploring_panels: Integer,
    ) -> None:
        line = length * tile.size

        def start_of(column: Integer, k: Integer) -> Integer:
            return tile.index(starts, tile.index(column, k))

        for pointers, column, panels, here in (
            (active, of_active, active_panels, gradient),
            (exploring, of_exploring, exploring_panels, gradient + beyond),
        ):
            first, last = share(tile, pointers, panels, height, part, parts)
            with (
                tile.loop(0, tiles) as number,
                _strips(tile, length - lead) as (strip, width),
                segments(tile, pointers, panels, first, last) as (row, begin, end),
            ):
                add_dots(
                    tile,
                    here,
                    g + (number * height + row) * line + (lead + strip) * tile.size,
                    x + number * depth * line + strip * tile.size,
                    width,
                    partial(start_of, column),
                    begin,
                    end,
                    ENTRIES,
                )

    return Kernel(emit, dtype)


@contextmanager
def _strips(tile: Tile, width: Integer) -> Iterator[tuple[Integer, Integer]]:
    """Walk a row in strips; yield where each begins and how wide it is."""
    step = tile.integer(STRIP * tile.lanes)
    with tile.loop(0, width, step) as strip:
        left = width - strip
        yield strip, step.where(step.below(left), left)
