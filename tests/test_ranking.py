"""One ranking, whichever way it is computed: by bits or by values; see `test_device` too."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from topkast_func import ranking
from topkast_func.ranking import NaNParameterError, largest_among, magnitudes, top_sets
from topkast_func.testing import blocked, weights
from topkast_func.types import BlockNorm

NEVER = 2**62


@pytest.fixture(autouse=True, params=[1, NEVER], ids=["bits", "values"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank every tensor in one way."""
    monkeypatch.setattr(ranking, "MANY", request.param)


def fractions() -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted)


def marked(scores: Tensor, places: Iterable[int], count: int) -> reference.Mask:
    mask = np.zeros(scores.numel(), bool)
    mask[reference.ranked(scores.double().numpy(), places)[:count]] = True
    return mask.reshape(scores.shape)


@given(weights(), fractions())
def test_sets_equal_the_oracle(theta: Tensor, shares: list[float]) -> None:
    scores = magnitudes("w", theta, (1, 1), "l2")
    forward, backward = (1 + int(share * (theta.numel() - 1)) for share in shares)
    for mask, count in zip(
        top_sets("w", scores, forward, backward), (forward, backward), strict=True
    ):
        assert mask.dtype == torch.bool
        np.testing.assert_array_equal(mask, marked(theta, range(theta.numel()), count))


@given(blocked(), fractions(), st.sampled_from(["l2", "l1"]))
def test_sets_of_blocks_equal_the_oracle(
    drawn: tuple[Tensor, tuple[int, int]], shares: list[float], norm: BlockNorm
) -> None:
    theta, block = drawn
    scores = magnitudes("w", theta, block, norm)
    forward, backward = (1 + int(share * (scores.numel() - 1)) for share in shares)
    for mask, count in zip(
        top_sets("w", scores, forward, backward), (forward, backward), strict=True
    ):
        np.testing.assert_array_equal(mask, marked(scores, range(scores.numel()), count))


@given(weights(), st.data())
def test_ties_among_candidates_go_by_their_place_in_the_whole_tensor(
    theta: Tensor, data: st.DataObject
) -> None:
    scores, n = magnitudes("w", theta, (1, 1), "l2"), theta.numel()
    candidates = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    places = candidates.nonzero()[0]
    count = data.draw(st.integers(0, len(places)))
    shaped = torch.from_numpy(candidates).view(theta.shape)
    found = largest_among("w", shaped, scores, count)
    assert found.dtype == torch.bool
    np.testing.assert_array_equal(found, marked(theta, map(int, places), count))


def test_the_place_among_candidates_does_not_decide() -> None:
    """Of the flat indices 0 to 5 the keys are in the order 3, 5, 4, 1, 2, 0; of 2, 0 here."""
    candidates = torch.tensor([[True, False, True], [False, False, False]])
    found = largest_among("w", candidates, torch.zeros(2, 3), 1)
    assert found.flatten().nonzero().tolist() == [[2]]


def test_scores_and_candidates_of_any_strides() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 1.0]]).T
    candidates = (scores > 0).T.contiguous().T
    assert not scores.is_contiguous()
    expected = marked(scores.contiguous(), range(6), 3)
    np.testing.assert_array_equal(top_sets("w", scores, 3, 3)[0], expected)
    np.testing.assert_array_equal(largest_among("w", candidates, scores, 3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_of_both_signs_are_tied_and_infinity_ranks_first(dtype: torch.dtype) -> None:
    scores = torch.tensor([0.0, -0.0, 0.0, -0.0, -torch.inf, 5e-324], dtype=dtype)
    for count in range(1, 7):
        np.testing.assert_array_equal(
            top_sets("w", scores, 1, count)[1], marked(scores, range(6), count)
        )


def test_nan_is_named_where_it_could_be_chosen() -> None:
    scores = torch.tensor([1.0, torch.nan, torch.inf])
    with pytest.raises(NaNParameterError, match=r"params\['w'\] holds NaN"):
        top_sets("w", scores, 1, 1)
    among = largest_among("w", torch.tensor([True, False, True]), scores, 1)
    assert among.tolist() == [False, False, True]
    with pytest.raises(NaNParameterError, match=r"params\['w'\] holds NaN"):
        largest_among("w", torch.tensor([True, True, True]), scores, 1)


def taps(numbers: Tensor) -> Tensor:
    return numbers.view(8, 5, 3, 3)[:, :, 1, 1]


def parts(numbers: Tensor) -> Tensor:
    return torch.view_as_complex(numbers.float().view(-1, 4, 2)).conj().imag


VIEWS = {
    "every other column": lambda numbers: numbers.view(12, 30)[:, ::2],
    "the middle of kernels": taps,
    "the last axis of three": lambda numbers: numbers.view(6, 20, 3)[..., 1],
    "turned": lambda numbers: numbers.view(12, 30).t(),
    "backwards in part": lambda numbers: numbers.view(12, 30)[3:, 5:],
    "one number": lambda numbers: numbers[7].expand(6, 9),
    "parts of conjugates": parts,
}


@pytest.mark.parametrize("dtype", ranking.RANKED)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_are_ranked_as_what_they_show(view: Any, dtype: torch.dtype) -> None:
    seen = view(torch.randn(360).to(dtype))
    copied = seen.clone(memory_format=torch.contiguous_format)
    for found, expected in zip(*(top_sets("w", w, 9, 20) for w in (seen, copied)), strict=True):
        assert torch.equal(found, expected)
    among = torch.rand(seen.shape) < 0.5
    assert torch.equal(largest_among("w", among, seen, 7), largest_among("w", among, copied, 7))
