"""The products of the engines that need no kernels of their own, against the oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.drawn import problems
from tests.kernels.problems import BATCHES, BLOCKS, DTYPES, Problem, check_products, problem

pytestmark = pytest.mark.parametrize("name", ["dense", "reference", "torch_sparse"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("batch", [0, 5])
def test_products_are_exact(
    name: str, block: tuple[int, int], dtype: torch.dtype, batch: int
) -> None:
    check_products(name, problem(block, dtype), batch)


@pytest.mark.parametrize("batch", BATCHES)
def test_products_of_any_batch(name: str, batch: int) -> None:
    check_products(name, problem((4, 1)), batch)


@given(problems(), st.integers(0, 5))
def test_products_of_any_sets(name: str, given: Problem, batch: int) -> None:
    check_products(name, given, batch)
