"""The products by torch-sparse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.problems import (
    BATCHES,
    BLOCKS,
    DTYPES,
    Problem,
    check_products,
    problem,
    problems,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("batch", [0, 5])
def test_products_are_exact(block: tuple[int, int], dtype: torch.dtype, batch: int) -> None:
    check_products("torch_sparse", problem(block, dtype), batch)


@pytest.mark.parametrize("batch", BATCHES)
def test_products_of_any_batch(batch: int) -> None:
    check_products("torch_sparse", problem((4, 1)), batch)


@settings(max_examples=30)
@given(problems(), st.integers(0, 5))
def test_products_of_any_sets(given: Problem, batch: int) -> None:
    check_products("torch_sparse", given, batch)
