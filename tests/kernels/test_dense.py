"""The products with the densified weight."""

import pytest
import torch
from hypothesis import given
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
    check_products("dense", problem(block, dtype), batch)


@pytest.mark.parametrize("batch", BATCHES)
def test_products_of_any_batch(batch: int) -> None:
    check_products("dense", problem((4, 1)), batch)


@given(problems(), st.integers(0, 5))
def test_products_of_any_sets(given: Problem, batch: int) -> None:
    check_products("dense", given, batch)


@pytest.mark.parametrize("batch", [0, 5])
def test_products_without_onednn(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    check_products("dense", problem(), batch)
