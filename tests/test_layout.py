"""Places of tensors in a file: aligned, without gaps, and what does not fit is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from topkast_func.files.layout import (
    CODES,
    DTYPES,
    Entry,
    as_json,
    check_places,
    entry_of,
    is_shape,
    laid_out,
)

SHAPES = st.lists(st.integers(0, 4), max_size=3)
TENSORS = st.dictionaries(
    st.text(max_size=3),
    st.builds(
        lambda dtype, shape: torch.zeros(shape, dtype=dtype), st.sampled_from([*CODES]), SHAPES
    ),
    max_size=6,
)


@given(TENSORS)
def test_every_tensor_has_an_aligned_place_of_its_size(tensors: dict[str, Tensor]) -> None:
    entries = laid_out(tensors)
    assert list(entries) == list(tensors)
    taken: set[int] = set()
    for name, (dtype, shape, start, end) in entries.items():
        tensor = tensors[name]
        assert (dtype, shape, end - start) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert start % tensor.element_size() == 0
        assert taken.isdisjoint(range(start, end))
        taken |= {*range(start, end)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert taken == {*range(size)}
    check_places(entries, size)
    for wrong in (size + 1, size - 1):
        with pytest.raises(ValueError, match=f"have {size} bytes, and there are {wrong}"):
            check_places(entries, wrong)


@given(TENSORS)
def test_an_entry_comes_back_from_json(tensors: dict[str, Tensor]) -> None:
    for name, entry in laid_out(tensors).items():
        assert entry_of(name, as_json(entry)) == entry


def test_gaps_and_overlaps_are_refused() -> None:
    first = Entry(torch.uint8, (4,), 0, 4)
    for start in (3, 5):
        second = Entry(torch.uint8, (4,), start, start + 4)
        with pytest.raises(ValueError, match=f"b begins at byte {start}, not at 4"):
            check_places({"b": second, "a": first}, start + 4)


@pytest.mark.parametrize("shape", [[], [0], [3, 4], [0, 2**40, 2**22], [1] * 64])
def test_shapes(shape: list[int]) -> None:
    assert is_shape(shape)
    assert torch.empty(shape, device="meta").shape == tuple(shape)


@pytest.mark.parametrize(
    "value",
    [
        *(None, 3, "34", (3,), {}, [-1], [1.0], [True], ["1"], [None], [[1]], [1] * 65),
        *([2**63], [2**32, 2**32], [0, 2**62, 2**62], [10**400]),
    ],
    ids=str,
)
def test_what_is_no_shape(value: object) -> None:
    assert not is_shape(value)


def test_every_dtype_has_one_name() -> None:
    assert len(CODES) == len(DTYPES)
