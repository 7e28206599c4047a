"""Products of a few rows of activations with a matrix in CSR: what is stored is read once."""

import itertools
from functools import cache, reduce
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from topkast_func.kernels.integers import Integer
from topkast_func.kernels.llvm import Kernel
from topkast_func.kernels.rows import share
from topkast_func.kernels.vectors import Tile

CHAINS = 2
"""Vectors of sums of a row that are added to in turn, as one would wait for its last addition."""


def few_rows_times(
    x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, features: int
) -> Tensor:
    """Return x·αᵀ + b.

    Args:
        x: [batch, in_features], few rows: for each number there is a kernel.
        values: [stored].
        rows: Where each row starts, int32, [features + 1].
        columns: Column of each, int32, [stored].
        bias: [features], or None.
        features: Rows of α.

    Returns:
        [batch, features].
    """
    batch, depth = x.shape
    y = x.new_empty(batch, features)
    index = rows, columns, values, x, values if bias is None else bias, y
    work = values.numel() * batch
    _kernel(batch, bias is not None, x.dtype)(*index, features, depth, work=work)
    return y


@cache
def _kernel(batch: int, biased: bool, dtype: torch.dtype) -> Kernel:
    chains = max(1, CHAINS // batch)

    def emit(
        tile: Tile,
        part: Integer,
        parts: Integer,
        pointers: Integer,
        column: Integer,
        values: Integer,
        x: Integer,
        bias: Integer,
        y: Integer,
        height: Integer,
        depth: Integer,
    ) -> None:
        builder = tile.builder
        sums = tile.sums(batch, chains)
        first, last = share(tile, pointers, tile.integer(1), height, part, parts)
        with tile.loop(first, last) as row:
            for total in itertools.chain(*sums):
                builder.store(tile.zero, total)
            ends = tile.index(pointers, row), tile.index(pointers, row + 1)
            steps = [tile.lanes * chains, tile.lanes, 4, 1]
            for together, k in tile.runs(*ends, sorted({*steps}, reverse=True)):
                for start in range(0, together, tile.lanes):
                    entries = [k + i for i in range(start, min(start + tile.lanes, together))]
                    places = [tile.index(column, entry) for entry in entries]
                    weights = _vector(tile, [tile.number(values, entry) for entry in entries])
                    for number, of_row in enumerate(sums):
                        inputs = [tile.number(x, depth * number + place) for place in places]
                        total = of_row[start // tile.lanes if together >= tile.lanes else -1]
                        tile.add_product(total, weights, _vector(tile, inputs))
            for number, of_row in enumerate(sums):
                total = tile.across([reduce(builder.fadd, map(builder.load, of_row))])
                y_row = builder.extract_element(total, ir.Constant(ir.IntType(32), 0))
                if biased:
                    y_row = builder.fadd(y_row, tile.number(bias, row))
                builder.store(y_row, tile.at(y, height * number + row, tile.scalar, tile.size))

    return Kernel(emit, dtype)


def _vector(tile: Tile, numbers: list[Any]) -> Any:
    """Return a vector of numbers, zero in the lanes after them."""
    vector = tile.zero
    for lane, number in enumerate(numbers):
        place = ir.Constant(ir.IntType(32), lane)
        vector = tile.builder.insert_element(vector, number, place)
    return vector
