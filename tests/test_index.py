"""The values of B apart from θ: split and merge, α, and slots that follow."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.drawn import problems
from tests.kernels.problems import Problem, problem
from topkast_func.model.alpha import alpha, merge, split
from topkast_func.places import places_apart
from topkast_func.storage import index
from topkast_func.storage.index import (
    Index,
    Positions,
    carry,
    old_slots,
    reindex,
)
from topkast_func.types import Masks


def sets_of(given: Problem, kind: str) -> tuple[Index, tuple[int, int]]:
    """The sets as a pattern of blocks, or as positions of entries."""
    if kind == "pattern":
        return given.pattern, given.block
    return Positions(*places_apart(given.forward, given.backward)), (1, 1)


every_kind = st.sampled_from(["pattern", "positions"])


@given(problems(), every_kind)
def test_merge_is_the_inverse_of_split_on_b(given: Problem, kind: str) -> None:
    sets, block = sets_of(given, kind)
    places = sets.flat_index(block, given.theta.shape)
    values = split(given.theta, places)
    assert values.shape == places.shape
    if kind == "pattern":
        assert torch.equal(values, given.values)
    before = given.theta.clone()
    merged = merge(2 * values, given.theta, places)
    assert torch.equal(given.theta, before)
    assert torch.equal(merged, torch.where(given.backward, 2 * given.theta, given.theta))
    assert torch.equal(split(merged, places), 2 * values)


@given(problems(), every_kind)
def test_unused_places_hold_zero_and_reach_nothing(given: Problem, kind: str) -> None:
    sets, block = sets_of(given, kind)
    size = int(given.forward.sum())
    frozen = reindex(sets, Masks(given.forward, given.forward), block, (size, size))
    assert (
        frozen.flat_index(block, given.theta.shape).shape
        == sets.flat_index(block, given.theta.shape).shape
    )
    places = frozen.flat_index(block, given.theta.shape)
    values = split(given.theta, places)
    active = frozen.active_count
    assert not values[active:].any()
    merged = merge(torch.full_like(values, 9.0), given.theta, places)
    assert torch.equal(merged, torch.where(given.forward, 9.0, given.theta))


@given(problems(), every_kind)
def test_alpha_has_the_gradient_of_the_identity_on_b(given: Problem, kind: str) -> None:
    sets, block = sets_of(given, kind)
    places = sets.flat_index(block, given.theta.shape)
    values = split(given.theta, places).requires_grad_()
    found = alpha(values, sets.parts, given.theta.shape)
    assert torch.equal(found.detach(), given.alpha)
    weight = torch.arange(1.0, given.theta.numel() + 1, dtype=given.theta.dtype)
    (gradient,) = torch.autograd.grad((found.flatten() * weight).sum(), values)
    assert torch.equal(gradient, weight[places])
    dense = lambda values: alpha(values, sets.parts, given.theta.shape)  # noqa: E731
    tangent = torch.func.jvp(dense, (values.detach(),), (weight[places],))[1]
    assert torch.equal(tangent.flatten(), weight * given.backward.flatten())


@given(problems(), st.integers(0, 1000), every_kind)
def test_a_slot_follows_its_weight(given: Problem, seed: int, kind: str) -> None:
    """Compare with slots in the shape of θ: zero where an entry newly enters B."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(given.theta.numel() // given.order.shape[1], generator=generator)
    grid = [side // n for side, n in zip(given.theta.shape, given.block, strict=True)]
    ranks = blocks.view(grid)
    ranks = ranks.repeat_interleave(given.block[0], 0).repeat_interleave(given.block[1], 1)
    active, chosen = (
        int(mask.sum()) // (given.block[0] * given.block[1])
        for mask in (given.forward, given.backward)
    )
    after = Masks(ranks < active, ranks < chosen)
    sets, block = sets_of(given, kind)
    new = reindex(sets, after, block, (int(after.forward.sum()), int(after.backward.sum())))
    places = [s.flat_index(block, given.theta.shape) for s in (sets, new)]
    assert places[0].shape == places[1].shape
    dense = torch.arange(1.0, given.theta.numel() + 1).view(given.theta.shape) * given.backward
    source = old_slots(places[0], places[1], given.theta.numel())
    moved = carry(split(dense, places[0]), source)
    assert torch.equal(moved, split(dense * after.backward, places[1]))


def test_positions_are_ascending_and_padded() -> None:
    given = problem(grid=(6, 9))
    masks = Masks(given.forward, given.backward)
    exact = Positions(*places_apart(*masks))
    padded = Positions(*places_apart(*masks, len(exact.exploring) + 3))
    assert torch.equal(torch.cat(exact), given.order.flatten())
    assert torch.equal(padded.exploring[:-3], exact.exploring)
    assert padded.exploring[-3:].tolist() == [54] * 3


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (24, 2), (48,)])
def test_positions_of_a_weight_of_any_axes(shape: tuple[int, ...]) -> None:
    theta = torch.randn(shape)
    backward = torch.rand(shape) < 0.6
    masks = Masks(backward & (torch.rand(shape) < 0.5), backward)
    sets = Positions(*places_apart(*masks))
    places = sets.flat_index((1, 1), theta.shape)
    values = split(theta, places)
    assert torch.equal(values, torch.cat([theta[masks.forward], theta[backward & ~masks.forward]]))
    assert torch.equal(alpha(values, sets.parts, theta.shape), theta * masks.forward)
    assert torch.equal(merge(values, torch.zeros(shape), places), theta * backward)


def test_an_unused_place_comes_from_nowhere() -> None:
    old, new = torch.tensor([4, 1, 6, 6]), torch.tensor([1, 5, 6, 4])
    assert old_slots(old, new, 6).tolist() == [1, -1, -1, 0]


def test_more_values_than_int32_counts_have_wider_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = torch.tensor([4, 1, 6, 6]), torch.tensor([1, 5, 6, 4])
    narrow = old_slots(old, new, 6)
    monkeypatch.setattr(index, "INDEX_LIMIT", 3)
    wide = old_slots(old, new, 6)
    assert (narrow.dtype, wide.dtype) == (torch.int32, torch.int64)
    assert torch.equal(narrow.long(), wide)


def test_on_the_meta_device_nothing_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "split", None)  # pieces of it would take minutes for large models
    theta, places = torch.empty(8, 8, device="meta"), torch.empty(3, 5, device="meta")
    values = index.split_in_pieces(theta.half(), places.long())
    assert (values.shape, values.dtype, values.is_meta) == (places.shape, torch.float16, True)
