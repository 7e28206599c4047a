"""Places: what is repeated by counts, on whatever the counts are."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from topkast_func.places import repeated

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
