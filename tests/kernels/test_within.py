"""What lies outside of bits is put back, bit for bit, whatever the size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topkast_func.bits import packed
from topkast_func.kernels.within import keep_within

DTYPES = st.sampled_from([torch.float32, torch.float64])
ODD = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])


@given(st.integers(1, 200), st.floats(0, 1), DTYPES, st.booleans(), st.integers(0, 1000))
def test_any_size(n: int, density: float, dtype: torch.dtype, zeros: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    inside = torch.rand(n, generator=draw) < density
    tensor, others = torch.randn(2, n, generator=draw, dtype=dtype)
    expected = torch.where(inside, tensor, 0.0 if zeros else others)
    keep_within(packed(inside), tensor, None if zeros else others)
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_the_work_and_bits_are_kept(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inside = torch.rand(5, 1001) < 0.3
        tensor, others = ODD.repeat(2, 5, 251)[..., :1001].flip(2).unbind()
        tensor, others = tensor.flip(1).contiguous(), others.contiguous()
        expected = torch.where(inside, tensor, others)
        keep_within(packed(inside), tensor, others)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(tensor.view(torch.int32), expected.view(torch.int32))
