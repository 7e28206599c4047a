"""Checksums of tensors."""

import pytest
import torch

from topkast_func.distributed import checksums
from topkast_func.distributed.checksums import checksum

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bit_and_any_exchange_changes_the_checksum(dtype: torch.dtype) -> None:
    tensor = (3 * torch.randn(3, 5)).to(dtype)
    tensor.flatten()[0] = 0
    first = checksum(tensor)
    assert checksum(tensor.clone()) == first
    data = tensor.flatten().view(torch.uint8)
    for place in range(len(data)):
        for bit in range(1 if dtype == torch.bool else 8):
            data[place] ^= 1 << bit
            assert checksum(tensor) != first
            data[place] ^= 1 << bit
    swapped = tensor.flatten().clone()
    place = int((swapped != 0).nonzero()[0])
    swapped[0], swapped[place] = tensor.flatten()[place], 0
    assert checksum(swapped.view(3, 5)) != first


def test_a_checksum_is_of_the_entries_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(7, 11)
    whole = checksum(tensor)
    assert checksum(tensor.t().contiguous().t()) == whole
    monkeypatch.setattr(checksums, "PIECE", 10)
    assert checksum(tensor) == whole
    bits = tensor.flatten().view(torch.int32).tolist()
    total = sum((2 * i + 1) * b for i, b in enumerate(bits))
    assert (whole - total) % 2**64 == 0


def test_no_entry_has_a_checksum() -> None:
    assert checksum(torch.empty(0)) == 0
    assert checksum(torch.tensor(1.0)) != 0


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_the_numbers_of_a_quantised_tensor_count() -> None:
    numbers = torch.quantize_per_tensor(torch.arange(3.0), 0.1, 0, torch.qint8)
    assert checksum(numbers) == checksum(numbers.int_repr())
