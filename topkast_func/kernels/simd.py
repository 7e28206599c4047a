"""Register-blocked loops in LLVM's vector types, which no vectoriser reaches by itself.

Each keeps its sums in vector registers over a run of stored blocks of one block row. Addresses
are integers; activations are tiles [features, width] of contiguous rows, ``width`` numbers long
and a multiple of a vector.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

from topkast_func.kernels.integers import Integer
from topkast_func.kernels.vectors import Tile

REGISTERS = 16
"""Vector registers that hold sums; the others hold operands."""

CHAINS = 4
"""Sums that are added to in turn, where one would wait for its last addition."""


def add_rows(
    tile: Tile,
    y: Integer,
    x: Integer,
    width: Integer,
    start_of: Callable[[Integer], Integer],
    values: Integer,
    place: Integer | None,
    start: Integer,
    end: Integer,
    block: tuple[int, int],
) -> None:
    """Emit y[i] += Σ_k Σ_j values[place(k)][i, j] · x[start_of(k) + j·width] for k in [start, end).

    Args:
        tile: What emits.
        y: A block row of r rows of sums, of what `Tile.wide` is of.
        x: The whole tile.
        width: Of the tile.
        start_of: Where in x a stored block begins to read, in numbers.
        values: Of the stored blocks: [r, c] of them; or, where there are places, [c, r].
        place: Which of the values each stored block is, int32; None for their order.
        start: The first stored block.
        end: The one after the last.
        block: (r, c).
    """
    (height, depth), taken, wide = block, tile.taken, tile.wide
    joined = taken if depth % taken else 1  # blocks, where a column has no other beside it
    group = max(n for n in range(1, REGISTERS // taken + 1) if height % n == 0)
    most = min(8, REGISTERS // (group * taken))
    for count, vector in tile.runs(0, width // tile.lanes, _halvings(most)):
        lane, sums = vector * tile.lanes, count * taken
        with tile.loop(0, height // group) as which:
            numbers = [which * group + i for i in range(group)]
            outputs = [wide.beside(y, number * width + lane, sums) for number in numbers]
            chains = [wide.sums(group, sums) for _ in range(max(1, CHAINS // (group * sums)))]
            first, *others = ([*itertools.chain(*chain)] for chain in chains)
            for output, total in zip(itertools.chain(*outputs), first, strict=True):
                tile.builder.store(wide.load(output), total)
            for total in itertools.chain(*others):
                tile.builder.store(wide.zero, total)
            steps = sorted({1, joined, joined * len(chains)}, reverse=True)
            for together, k in tile.runs(start, end, steps):
                for chain, i in zip(chains, range(0, together, joined), strict=False):
                    blocks = [k + entry for entry in range(i, min(i + joined, together))]
                    stored = [b if place is None else tile.index(place, b) for b in blocks]
                    reads = [start_of(b) + lane for b in blocks]
                    with tile.loop(0, depth, taken // joined) as column:
                        columns = [column + term for term in range(taken // joined)]
                        factors = tile.factors([
                            [*map(tile.load, tile.beside(x, read + j * width, count))]
                            for read in reads
                            for j in columns
                        ])
                        for number, line in zip(numbers, chain, strict=True):
                            within = [
                                number * depth + j if place is None else j * height + number
                                for j in columns
                            ]
                            weight = tile.weight(
                                values, [b * (height * depth) + w for b in stored for w in within]
                            )
                            for total, factor in zip(line, factors, strict=True):
                                tile.add_product(total, weight, factor)
            for output, *totals in zip(itertools.chain(*outputs), first, *others, strict=True):
                wide.store(reduce(tile.builder.fadd, map(tile.builder.load, totals)), output)


def add_dots(
    tile: Tile,
    gradient: Integer,
    g: Integer,
    x: Integer,
    width: Integer,
    start_of: Callable[[Integer], Integer],
    start: Integer,
    end: Integer,
    block: tuple[int, int],
) -> None:
    """Emit gradient[k][i, j] += ⟨g[i], x[start_of(k) + j·width]⟩ for k in [start, end).

    The columns of all the blocks are counted through and taken several at a time, beside up to
    four rows.

    Args:
        tile: What emits.
        gradient: Of the stored blocks, [r, c] each, of what `Tile.wide` is of.
        g: A block row of r rows.
        x: The whole tile.
        width: Of the tile.
        start_of: Where in x a stored block begins to read, in numbers.
        start: The first stored block.
        end: The one after the last.
        block: (r, c).
    """
    (block_height, size), wide = block, tile.wide
    height = _halvings(_power_within(block_height, 4))[0]
    for count, q in tile.runs(start * size, end * size, _together(*block)):
        places, inputs = [], []
        for at in (q + j for j in range(count)):
            stored, within = at // size, at % size
            places.append(stored * (block_height * size) + within)
            inputs.append(start_of(stored) + within * width)
        with tile.loop(0, block_height // height) as group:
            rows = [group * height + i for i in range(height)]
            sums = wide.sums(height, count)
            for total in itertools.chain(*sums):
                tile.builder.store(wide.zero, total)
            with tile.loop(0, width, tile.lanes) as lane:
                left = [tile.load(*tile.beside(g, row * width + lane, 1)) for row in rows]
                for j, input_ in enumerate(inputs):
                    right = tile.load(*tile.beside(x, input_ + lane, 1))
                    for i in range(height):
                        tile.add_product(sums[i][j], left[i], right)
            totals = [[tile.builder.load(total) for total in line] for line in sums]
            for i, j, run in _adjacent(totals, *block):
                for part in range(0, len(run), wide.lanes):
                    total = wide.across(run[part : part + wide.lanes])
                    offset = places[j] + rows[i] * size + part
                    here = wide.at(gradient, offset, total.type, wide.size)
                    wide.store(tile.builder.fadd(wide.load(here), total), here)


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
