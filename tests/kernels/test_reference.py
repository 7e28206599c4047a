"""The products in plain torch, which follow the oracle exactly on small integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.drawn import problems
from tests.kernels.problems import Problem, check_products, integers, problem, products
from topkast_func.kernels import reference


@settings(max_examples=20)
@given(problems(), st.integers(1, 9))
def test_products_in_pieces_are_those_at_once(given: Problem, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "PIECE", piece)
        check_products("reference", given, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed(dtype: torch.dtype) -> None:
    half = problem((1, 4), dtype, grid=(4, 3))
    x, g = integers(2, 12, dtype=dtype), integers(2, 4, dtype=dtype)
    found = products("reference", half, x, g)
    expected = products(
        "reference", half._replace(theta=half.theta.double()), x.double(), g.double()
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours.double(), theirs)  # sums of few small integers are exact
