"""Masks as bits, beside NumPy's."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from topkast_func.bits import packed, unpacked


@given(arrays(np.bool_, array_shapes(max_dims=4, min_side=0, max_side=9)))
def test_bits_are_those_of_numpy_and_come_back(mask: NDArray[np.bool_]) -> None:
    tensor = torch.from_numpy(mask)
    bits = packed(tensor)
    assert bits.dtype == torch.uint8
    np.testing.assert_array_equal(bits.numpy(), np.packbits(mask, bitorder="little"))
    assert torch.equal(unpacked(bits, tensor.shape), tensor)


@given(st.integers(0, 2**24 - 1), st.integers(1, 24))
def test_every_byte_is_a_mask(number: int, n: int) -> None:
    bits = torch.tensor([number >> i & 255 for i in (0, 8, 16)], dtype=torch.uint8)
    mask = unpacked(bits, torch.Size([n]))
    assert mask.tolist() == [bool(number >> i & 1) for i in range(n)]
