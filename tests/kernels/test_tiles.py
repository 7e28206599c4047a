"""Activations as tiles: packed, padded and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.problems import DTYPES
from topkast_func.kernels.tiles import TILE_BYTES, VECTOR_BYTES, pack, unpack


@given(st.integers(0, 700), st.integers(1, 9), st.sampled_from(DTYPES))
def test_unpacking_is_the_inverse_of_packing(batch: int, n: int, dtype: torch.dtype) -> None:
    x = torch.arange(1, batch * n + 1).to(dtype).view(batch, n)
    tiles = pack(x)
    assert torch.equal(unpack(tiles, batch), x)
    padding = tiles.transpose(1, 2).flatten(0, 1)[batch:]
    assert not padding.any()


@given(st.integers(0, 700), st.integers(1, 9), st.sampled_from(DTYPES))
def test_rows_of_a_tile_are_whole_vectors_that_fit(batch: int, n: int, dtype: torch.dtype) -> None:
    tiles = pack(torch.ones(batch, n, dtype=dtype))
    assert tiles.is_contiguous()
    assert tiles.shape[1] == n
    width = tiles.shape[2] * dtype.itemsize
    assert width % VECTOR_BYTES == 0
    assert 0 < width <= TILE_BYTES
    lanes = VECTOR_BYTES // dtype.itemsize
    assert tiles.shape[0] * tiles.shape[2] - max(batch, 1) < tiles.shape[0] * lanes


@pytest.mark.parametrize("view", [torch.t, lambda x: x[::2], lambda x: x.flip(0)])
def test_strides_do_not_matter(view: object) -> None:
    x = view(torch.randn(6, 6))  # type: ignore[operator]
    assert torch.equal(pack(x), pack(x.clone(memory_format=torch.contiguous_format)))
    assert torch.equal(unpack(pack(x), len(x)), x)
