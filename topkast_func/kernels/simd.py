"""Register-blocked loops in LLVM's vector types, which Numba's own vectoriser does not reach.

Each intrinsic keeps its sums in vector registers over a run of stored blocks of one block row.
Operands are addresses; activations are tiles [features, width] of contiguous rows, ``width``
numbers long and a multiple of a vector. The sizes of a block are literal integers.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic

from topkast_func.kernels.vectors import Tile

_I32, _I64 = ir.IntType(32), ir.IntType(64)

REGISTERS = 16
"""Vector registers that hold sums; the others hold operands."""

CHAINS = 4
"""Sums that are added to in turn, where one would wait for its last addition."""


def _literals(*arguments: Any) -> list[int]:
    if not all(isinstance(a, types.IntegerLiteral) for a in arguments):
        raise RequireLiteralValue("sizes of a register tile are literal integers")
    return [a.literal_value for a in arguments]


@intrinsic(prefer_literal=True)
def add_rows(
    typing_context: Any,
    kind: Any,
    y: Any,
    x: Any,
    width: Any,
    column: Any,
    values: Any,
    place: Any,
    start: Any,
    end: Any,
    rows: Any,
    columns: Any,
    transposed: Any,
) -> Any:
    """Emit y[i] += Σ_k Σ_j values[place(k)][i, j] · x[column[k]·columns + j] for k in [start, end).

    ``y`` is a block row of ``rows`` rows, ``x`` the whole tile. A stored block is
    [rows, columns] and place(k) is k; or, ``transposed``, [columns, rows] and place[k].

    Returns:
        The types, and what emits the code, as Numba asks.
    """
    height, depth, swapped = _literals(rows, columns, transposed)
    group = max(n for n in range(1, REGISTERS + 1) if height % n == 0)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        _, y, x, width, column, values, place, start, end, *_ = arguments
        tile = Tile(builder, kind.dtype)
        zero = tile.constant(0)
        vectors = builder.udiv(width, tile.constant(tile.lanes))
        for count, vector in tile.runs(zero, vectors, _halvings(min(8, REGISTERS // group))):
            lane = builder.mul(vector, tile.constant(tile.lanes))
            with tile.counted(height // group) as which:
                top = builder.mul(which, tile.constant(group))
                numbers = [builder.add(top, tile.constant(i)) for i in range(group)]
                above = [builder.add(builder.mul(number, width), lane) for number in numbers]
                outputs = [tile.beside(y, offset, count) for offset in above]
                chains = [tile.sums(group, count) for _ in range(max(1, CHAINS // (group * count)))]
                for output, total in _paired(outputs, chains[0]):
                    builder.store(tile.load(output), total)
                for together, k in tile.runs(start, end, sorted({1, len(chains)}, reverse=True)):
                    for i, sums in enumerate(chains[:together]):
                        entry = builder.add(k, tile.constant(i))
                        stored = tile.index(place, entry) if swapped else entry
                        block = builder.mul(stored, tile.constant(height * depth))
                        feature = builder.mul(tile.index(column, entry), tile.constant(depth))
                        with tile.counted(depth) as j:
                            row = builder.mul(builder.add(feature, j), width)
                            beside = tile.beside(x, builder.add(row, lane), count)
                            inputs = [tile.load(pointer) for pointer in beside]
                            for number, line in zip(numbers, sums, strict=True):
                                within = (
                                    tile.at_2d(j, number, height)
                                    if swapped
                                    else tile.at_2d(number, j, depth)
                                )
                                at = builder.add(block, within)
                                weight = tile.splat(tile.number(values, at))
                                for total, input_ in zip(line, inputs, strict=True):
                                    tile.add_product(total, weight, input_)
                first, *others = ([*itertools.chain(*sums)] for sums in chains)
                for output, total, *more in zip(
                    itertools.chain(*outputs), first, *others, strict=True
                ):
                    result = builder.load(total)
                    for other in more:
                        result = builder.fadd(result, builder.load(other))
                    tile.store(result, output)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 8, rows, columns, transposed), codegen


@intrinsic(prefer_literal=True)
def add_dots(
    typing_context: Any,
    kind: Any,
    gradient: Any,
    g: Any,
    x: Any,
    width: Any,
    column: Any,
    start: Any,
    end: Any,
    rows: Any,
    columns: Any,
) -> Any:
    """Emit gradient[k][i, j] += ⟨g[i], x[column[k]·columns + j]⟩ for k in [start, end).

    ``g`` is a block row of ``rows`` rows, ``x`` the whole tile; a stored block is
    [rows, columns]. The columns of all the blocks are counted through and taken several at a
    time, beside up to four rows.

    Returns:
        The types, and what emits the code, as Numba asks.
    """
    block_height, block_width = _literals(rows, columns)
    height = _halvings(_power_within(block_height, 4))[0]

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        _, gradient, g, x, width, column, start, end, *_ = arguments
        tile = Tile(builder, kind.dtype)
        size = tile.constant(block_width)
        first, last = builder.mul(start, size), builder.mul(end, size)
        for count, q in tile.runs(first, last, _together(block_height, block_width)):
            places, inputs = [], []
            for j in range(count):
                at = builder.add(q, tile.constant(j))
                block, within = builder.udiv(at, size), builder.urem(at, size)
                before = builder.mul(block, tile.constant(block_height * block_width))
                places.append(builder.add(before, within))
                feature = builder.add(builder.mul(tile.index(column, block), size), within)
                inputs.append(builder.mul(feature, width))
            with tile.counted(block_height // height) as group:
                top = builder.mul(group, tile.constant(height))
                rows_ = [builder.add(top, tile.constant(i)) for i in range(height)]
                outputs = [builder.mul(width, row) for row in rows_]
                sums = tile.sums(height, count)
                for total in itertools.chain(*sums):
                    builder.store(tile.zero, total)
                step, zero = tile.constant(tile.lanes), tile.constant(0)
                with cgutils.for_range_slice(builder, zero, width, step, intp=_I64) as (b, _):
                    left = [tile.load(*tile.beside(g, builder.add(row, b), 1)) for row in outputs]
                    for j, row in enumerate(inputs):
                        right = tile.load(*tile.beside(x, builder.add(row, b), 1))
                        for i in range(height):
                            tile.add_product(sums[i][j], left[i], right)
                totals = [[builder.load(total) for total in line] for line in sums]
                for i, j, run in _adjacent(totals, block_height, block_width):
                    place = builder.add(places[j], builder.mul(rows_[i], size))
                    for part in range(0, len(run), tile.lanes):
                        total = tile.across(run[part : part + tile.lanes])
                        offset = builder.add(place, tile.constant(part))
                        here = tile.at(gradient, offset, total.type, tile.size)
                        tile.store(builder.fadd(tile.load(here), total), here)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 7, rows, columns), codegen


def _paired(a: list[list[Any]], b: list[list[Any]]) -> Iterator[tuple[Any, Any]]:
    """Yield the pairs of entries of two matrices of one shape."""
    for lines in zip(a, b, strict=True):
        yield from zip(*lines, strict=True)


def _power_within(number: int, most: int) -> int:
    """Return the largest power of two that divides ``number``, ``most`` at most."""
    return min(number & -number, most)


def _halvings(most: int) -> list[int]:
    """Return ``most`` and its halves down to 1."""
    return [most] + (_halvings(most // 2) if most > 1 else [])


def _together(block_height: int, block_width: int) -> list[int]:
    """Return how many columns to take together, the largest number first, 1 last."""
    if block_height == 1 or block_width == 1:
        return _halvings(8 if block_height % 2 else 4)
    return _halvings(_power_within(block_width, 4))


def _adjacent(totals: Any, block_height: int, block_width: int) -> Iterator[tuple[int, int, Any]]:
    """Yield first row, first column and totals of what lies side by side in the stored blocks."""
    height, count = len(totals), len(totals[0])
    if block_width == 1 and height == block_height:
        yield 0, 0, [totals[i][j] for j in range(count) for i in range(height)]
    elif block_width == 1:
        yield from ((0, j, [line[j] for line in totals]) for j in range(count))
    else:
        yield from ((i, 0, line) for i, line in enumerate(totals))
