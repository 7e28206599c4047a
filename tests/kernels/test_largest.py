"""The largest by their bits: the same with any number of threads, and far from small."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests import reference
from topkast_func.kernels.largest import top_marks
from topkast_func.ranking import top_by_bits
from topkast_func.tiebreak import tie_key

SIZE = 70_001


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(kind: str) -> NDArray[np.float64]:
    drawn = np.random.default_rng(0).standard_normal(SIZE)
    return {
        "continuous": drawn,
        "half": drawn.astype(np.float16).astype(float),
        "signs": np.sign(np.round(drawn)),
        "zeros": 0 * drawn,
        "few": np.where(drawn > 2, drawn, 0),
    }[kind]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("among", [False, True], ids=["all", "among others"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", ["continuous", "half", "signs", "zeros", "few"])
def test_marks_equal_those_of_a_sort(kind: str, dtype: type, among: bool) -> None:
    """Sorted by (−abs(number), key); the smaller mask ends among ties, and the larger."""
    given: NDArray[Any] = numbers(kind).astype(dtype)
    places = np.sort(np.random.default_rng(1).permutation(3 * SIZE)[:SIZE])
    order = np.lexsort((tie_key(places if among else np.arange(SIZE)), -np.abs(given)))
    for counts in ((1, SIZE), (SIZE // 10, SIZE // 5), (300, 300), (SIZE - 1, SIZE)):
        found = top_marks(given, *counts, places if among else None)
        assert found is not None
        for mask, count in zip(found, counts, strict=True):
            np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(order[:count]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [0.0, torch.inf, torch.nan])
def test_half_precision_is_ranked_as_it_is(dtype: torch.dtype, last: float) -> None:
    given = torch.cat((torch.from_numpy(numbers("continuous")), torch.tensor([last]))).to(dtype)
    halves, floats = (top_by_bits(x, None, 7_000, 14_000) for x in (given, given.float()))
    if halves is None or floats is None:
        assert halves is floats
        assert given.isnan().any()
        return
    assert all(map(torch.equal, halves, floats))
    assert [int(mask.sum()) for mask in halves] == [7_000, 14_000]


def place_of(key: int) -> int:
    """Invert `reference.tie_key`, step by step."""
    z = key ^ key >> 31 ^ key >> 62
    z = z * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    z = z ^ z >> 27 ^ z >> 54
    z = z * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    z = z ^ z >> 30 ^ z >> 60
    return (z - 0x9E3779B97F4A7C15) % 2**64


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("base", [0, 2**16 - 20, 2**63, 2**64 - 40])
def test_keys_that_differ_in_their_last_bits_alone_are_told_apart(base: int) -> None:
    placed = {place_of(key): key for key in range(base, base + 40)}
    assert all(reference.tie_key(place) == key for place, key in placed.items())
    places = [place for place in placed if place < 2**63]
    assert len(places) > 9
    for count in range(1, len(places) + 1):
        marks = top_marks(np.zeros(len(places), np.float32), count, count, np.array(places))
        assert marks is not None
        first = sorted(places, key=placed.__getitem__)[:count]
        assert {place for place, mark in zip(places, marks[0], strict=True) if mark} == {*first}


@pytest.mark.usefixtures("threads")
def test_fewer_numbers_than_threads() -> None:
    marks = top_marks(np.zeros(2, np.float32), 1, 2)
    assert marks is not None
    assert [mask.tolist() for mask in marks] == [[False, True], [True, True]]


def test_nan_has_no_marks_and_infinity_has() -> None:
    given = np.array([1.0, np.inf, -np.inf, np.nan], np.float32)
    assert top_marks(given, 1, 1) is None
    marks = top_marks(given[:3], 2, 3)
    assert marks is not None
    assert marks[0].tolist() == [False, True, True]


@pytest.mark.parametrize("kind", ["continuous", "half", "zeros", "NaN"])
def test_marks_of_ranges_that_add_their_counts_are_those_of_the_whole(kind: str) -> None:
    given = numbers("continuous" if kind == "NaN" else kind).astype(np.float32)
    given[7] = np.nan if kind == "NaN" else given[7]
    cuts, told, turn = [0, 100, SIZE // 2, SIZE], dict[int, Any](), threading.Barrier(3)

    def marked(own: int) -> Any:
        def total(counts: NDArray[np.int64]) -> NDArray[np.int64]:
            told[own] = counts
            turn.wait()
            summed: NDArray[np.int64] = sum(told.values())
            turn.wait()
            return summed

        first, last = cuts[own : own + 2]
        return top_marks(given[first:last], 7_000, 14_000, first=first, total=total)

    with ThreadPoolExecutor(3) as beside:
        found = list(beside.map(marked, range(3)))
    whole = top_marks(given, 7_000, 14_000)
    if whole is None:
        assert found == [None] * 3
        return
    for mask, *parts in zip(whole, *found, strict=True):
        np.testing.assert_array_equal(mask, np.concatenate(parts))
