"""Flags on disk: they come back, in the fewer bytes, and what is no set is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topkast_func.files.packing import packed, unpacked


@given(st.lists(st.booleans(), max_size=70))
def test_flags_come_back(flags: list[bool]) -> None:
    mask = torch.tensor(flags, dtype=torch.bool)
    assert torch.equal(unpacked("x", packed(mask), len(flags)), mask)


@given(st.integers(0, 3000), st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_the_form_with_fewer_bytes_is_taken(size: int, count: int, seed: int) -> None:
    mask = torch.zeros(size, dtype=torch.bool)
    chosen = np.sort(np.random.default_rng(seed).choice(size, min(size, count), replace=False))
    mask[chosen] = True
    stored = packed(mask)
    assert stored.nbytes == min(-(-size // 8), 4 * len(chosen))
    if stored.dtype == torch.int32:
        assert stored.tolist() == chosen.tolist()
    else:
        byte, bit = np.divmod(chosen, 8)
        expected = np.zeros(-(-size // 8), np.uint8)
        np.bitwise_or.at(expected, byte, (1 << bit).astype(np.uint8))
        assert stored.tolist() == expected.tolist()
    assert torch.equal(unpacked("x", stored, size), mask)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            torch.zeros(12, dtype=torch.uint8),
            r"uint8 of shape \(12,\), which is no set among 100",
        ),
        (torch.zeros(1, 13, dtype=torch.uint8), r"shape \(1, 13\), which is no set"),
        (torch.full((13,), 128, dtype=torch.uint8), "a bit beyond the 100 that there are"),
        (torch.zeros(13, dtype=torch.bool), "torch.bool"),
        (torch.zeros(3, dtype=torch.int64), "torch.int64"),
        (torch.zeros(1, 1, dtype=torch.int32), "is no set"),
        (torch.zeros((), dtype=torch.int32), "is no set"),
        (torch.tensor([3, 3]).int(), "do not ascend within 100 entries"),
        (torch.tensor([4, 3]).int(), "do not ascend"),
        (torch.tensor([-1, 3]).int(), "do not ascend"),
        (torch.tensor([3, 100]).int(), "do not ascend"),
        (torch.tensor([0, 2**31 - 1, -(2**31), -1, 5]).int(), "do not ascend"),
    ],
)
def test_what_is_no_set_is_refused(stored: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"forward/a .*{message}"):
        unpacked("forward/a", stored, 100)
