"""Places: what is repeated by counts, on whatever the counts are."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from topkast_func import places
from topkast_func.places import bands, places_of, repeated

COUNTS = [2, 0, 3, 1, 0]
EXPECTED = [0, 0, 2, 2, 2, 3]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_each_index_comes_as_often_as_its_count_says(dtype: torch.dtype) -> None:
    found = repeated(torch.tensor(COUNTS, dtype=dtype), 6)
    assert (found.tolist(), found.dtype) == (EXPECTED, dtype)
    assert repeated(torch.zeros(3, dtype=dtype), 0).shape == (0,)


def test_counts_without_numbers_are_repeated_too() -> None:
    """On meta, among fake tensors and in a graph, where only the sum is known."""
    counts = torch.tensor(COUNTS)
    assert repeated(counts.to("meta"), 6).shape == (6,)
    with FakeTensorMode() as mode:
        assert repeated(mode.from_tensor(counts), 6).shape == (6,)
    compiled = torch.compile(repeated, backend="eager", fullgraph=True)
    assert compiled(counts, 6).tolist() == EXPECTED


@pytest.mark.parametrize("unit", [1, 2, 5])
def test_bands_are_whole_units_and_all_rows(monkeypatch: pytest.MonkeyPatch, unit: int) -> None:
    monkeypatch.setattr(places, "PIECE", 35)
    rows = torch.arange(40.0).view(20, 2)
    found = [rows[band] for band in bands(rows, unit)]
    assert torch.equal(torch.cat(found), rows)
    assert len(found) > 1
    assert all(len(band) % unit == 0 and band.numel() <= 35 for band in found)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_places_of_many_entries_are_found_in_pieces(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    mask = torch.rand(9, 11) < 0.4
    expected = [*mask.flatten().nonzero().squeeze(1), 99, 99]
    monkeypatch.setattr(places, "PIECE", 10)
    found = places_of(mask, len(expected), dtype)
    assert (found.tolist(), found.dtype) == ([int(i) for i in expected], dtype)
