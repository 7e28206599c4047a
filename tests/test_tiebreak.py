"""The order among equals: the numbers of splitmix64, in tensors and in arrays."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import reference
from topkast_func.testing import tie_key
from topkast_func.tiebreak import splitmix64

INDICES = st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 300), min_size=1)


@pytest.mark.parametrize(
    ("seed", "first"), [(0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317)]
)
def test_a_key_is_the_published_first_number_of_its_seed(seed: int, first: int) -> None:
    """The numbers that implementations of SplitMix64 are commonly tested with."""
    assert reference.tie_key(seed) == first
    assert int(tie_key(torch.tensor(seed))) + 2**63 == first
    assert int(splitmix64(torch.tensor(seed))) % 2**64 == first


@given(INDICES)
def test_tensors_and_arrays_have_the_keys_of_the_oracle(indices: list[int]) -> None:
    expected = [reference.tie_key(i) - 2**63 for i in indices]
    tensor, array = tie_key(torch.tensor(indices)), tie_key(np.array(indices))
    assert tensor.dtype == torch.int64
    assert array.dtype == np.int64
    assert tensor.tolist() == array.tolist() == expected


def test_the_shape_is_that_of_the_indices_which_stay_as_they_are() -> None:
    indices = torch.arange(12).view(3, 4)
    keys = tie_key(indices)
    assert keys.shape == (3, 4)
    assert len({*keys.flatten().tolist()}) == 12
    assert torch.equal(indices, torch.arange(12).view(3, 4))


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (7, "int"),
        ([7], "list"),
        (torch.arange(3).int(), "torch.int32"),
        (torch.zeros(3), "torch.float32"),
        (np.arange(3, dtype=np.uint64), "uint64"),
    ],
)
def test_what_is_not_int64_is_refused(wrong: object, kind: str) -> None:
    with pytest.raises(TypeError, match=f"indices must be an int64 tensor or array, got {kind}"):
        tie_key(wrong)  # type: ignore[type-var]
