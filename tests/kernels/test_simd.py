"""The register-blocked loops, on blocks whose sides reach every way of unrolling them."""

import numpy as np
import pytest
import torch

from tests.kernels.problems import DTYPES, check_products, problem
from topkast_func.kernels import simd
from topkast_func.kernels.simd import REGISTERS


def together(rows: int, columns: int) -> tuple[bool, bool, int]:
    """How a block is run through: rows in whole groups, one total a store, columns at a time."""
    return (
        rows <= REGISTERS,
        columns == 1,
        simd._together(rows, columns)[0],
    )


UNROLLED = [(8, 1), (3, 2), (17, 1)]
"""Shapes beside those of `BLOCKS`: totals stored in parts, pairs of columns, many rows."""


@pytest.mark.parametrize("block", UNROLLED)
@pytest.mark.parametrize("batch", [1, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_blocks_of_odd_sides(
    block: tuple[int, int], batch: int, dtype: torch.dtype
) -> None:
    check_products("numba", problem(block, dtype), batch)


def test_the_shapes_reach_different_ways() -> None:
    assert len({together(*block) for block in UNROLLED}) == len(UNROLLED)


@pytest.mark.parametrize(("number", "most", "power"), [(1, 4, 1), (6, 4, 2), (8, 4, 4), (12, 8, 4)])
def test_the_largest_power_of_two_that_divides(number: int, most: int, power: int) -> None:
    assert simd._power_within(number, most) == power


def test_every_run_of_columns_ends_one_by_one() -> None:
    for rows, columns in np.ndindex(20, 20):
        steps = simd._together(rows + 1, columns + 1)
        assert steps == sorted(steps, reverse=True)
        assert all(step & (step - 1) == 0 for step in steps)
        if columns == 0 or rows == 0:
            assert steps[-1] == 1
        else:
            assert (columns + 1) % steps[0] == 0
