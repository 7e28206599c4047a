"""Patterns: what they count, where they say the values stand, and their limits."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.drawn import problems
from tests.kernels.problems import Problem, integers, problem
from topkast_func.kernels import pattern, pattern_of
from topkast_func.kernels.pattern import BlockRows, block_of, flat, flat_in_bands


def counted(part: BlockRows) -> int:
    return int(part.pointers[-1])


@given(problems())
def test_pointers_and_columns_are_consistent(given: Problem) -> None:
    rows, columns = (side // n for side, n in zip(given.shape, given.block, strict=True))
    found = given.pattern
    for part, heights, widths in (
        (found.forward, rows, columns),
        (found.exploring, rows, columns),
        (found.transposed, columns, rows),
    ):
        assert part.pointers.dtype == part.columns.dtype == torch.int32
        assert part.pointers[0] == 0
        assert (part.pointers.diff() >= 0).all()
        assert counted(part) == part.columns.shape[0]
        assert (part.pointers.shape[0] - 1) % heights == 0
        panels = (part.pointers.shape[0] - 1) // heights
        for row in range(heights):
            of_row = part.columns[part.pointers[row * panels] : part.pointers[(row + 1) * panels]]
            assert (of_row.diff() > 0).all()
            assert ((of_row >= 0) & (of_row < widths)).all()


@given(problems())
def test_the_values_are_those_of_a_then_of_the_rest_in_row_major_order(given: Problem) -> None:
    found, size = given.pattern, given.block[0] * given.block[1]
    places = [flat(part, given.block, given.shape) for part in (found.forward, found.exploring)]
    assert torch.equal(torch.cat(places).reshape(-1, size), given.order)
    assert counted(found.forward) * size == int(given.forward.sum())
    together = counted(found.forward) + counted(found.exploring)
    assert together * size == int(given.backward.sum())


@given(problems())
def test_the_columns_of_a_are_a_permutation_of_its_rows(given: Problem) -> None:
    found = given.pattern
    assert torch.equal(found.places.sort().values, torch.arange(len(found.places)).int())
    down, across = given.block
    rows, columns = given.shape
    turned = flat(found.transposed, (across, down), (columns, rows)).view(-1, across, down)
    straight = flat(found.forward, given.block, given.shape).view(-1, down, across)
    of_column, of_row = turned // rows, turned % rows
    back = (of_row * columns + of_column).transpose(1, 2)
    assert torch.equal(back, straight[found.places.long()])


@given(problems(), st.integers(0, 7))
def test_unused_places_are_beyond_the_last_pointer(given: Problem, spare: int) -> None:
    exact = given.pattern
    places = exact.exploring.columns.shape[0] + spare
    padded = pattern_of(given.forward, given.backward, given.block, places)
    assert padded.exploring.columns.shape[0] == places
    assert counted(padded.exploring) == counted(exact.exploring)
    where = flat(padded.exploring, given.block, given.shape)
    used = places - spare
    assert torch.equal(where[:used], flat(exact.exploring, given.block, given.shape))
    assert (where[used:] == given.theta.numel()).all()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problems(), st.integers(0, 3), st.integers(1, 60))
def test_places_are_the_same_in_bands(
    monkeypatch: pytest.MonkeyPatch, given: Problem, spare: int, entries: int
) -> None:
    places = given.pattern.exploring.columns.shape[0] + spare
    part = pattern_of(given.forward, given.backward, given.block, places).exploring
    monkeypatch.setattr(pattern, "PIECE", entries)
    found = torch.cat([*flat_in_bands(part, given.block, given.shape)])
    assert torch.equal(found, flat(part, given.block, given.shape))


@given(problems(), st.integers(0, 3))
def test_places_are_the_same_in_fewer_bytes(given: Problem, spare: int) -> None:
    places = given.pattern.exploring.columns.shape[0] + spare
    padded = pattern_of(given.forward, given.backward, given.block, places)
    for part in (padded.forward, padded.exploring):
        wide, narrow = (flat(part, given.block, given.shape, way) for way in (False, True))
        assert (wide.dtype, narrow.dtype) == (torch.int64, torch.int32)
        assert torch.equal(narrow.long(), wide)


def test_places_that_int32_cannot_count_are_wide() -> None:
    pointers, columns = torch.tensor([0, 1, 2]), torch.tensor([2**30 - 1, 2**30 - 1])
    part = BlockRows(pointers.int(), columns.int())
    for shape, last in (((2, 2**30), 2**31 - 1), ((2, 2**31 - 1), 2**31 + 2**30 - 2)):
        where = flat(part, (1, 1), shape, narrow=True)
        assert where.tolist() == [2**30 - 1, last]


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
@pytest.mark.parametrize("density", [0.01, 0.5, 1.0])
def test_panels_are_an_even_cut_of_the_columns(block: tuple[int, int], density: float) -> None:
    wide = problem(block, grid=(5, 4000 // block[1]), densities=(density, density))
    part = wide.pattern.forward
    rows, columns = 5, wide.shape[1] // block[1]
    panels = (part.pointers.shape[0] - 1) // rows
    assert panels > 1
    for segment in range(rows * panels):
        of_segment = part.columns[part.pointers[segment] : part.pointers[segment + 1]]
        assert (of_segment.long() * panels // columns == segment % panels).all()
    where = flat(part, block, wide.shape).reshape(-1, block[0] * block[1])
    assert torch.equal(where, wide.order[: len(where)])


@pytest.mark.parametrize("columns", [2**16, 2**16 + 8])
def test_many_columns_keep_their_order(columns: int) -> None:
    mask = torch.zeros(2, columns, dtype=torch.bool)
    chosen = [0, 255, 256, 2**15, columns - 1]
    mask[:, chosen] = True
    found = pattern_of(mask, mask)
    assert found.forward.columns.tolist() == chosen * 2
    assert found.transposed.columns.tolist() == [0, 1] * 5
    assert found.places.tolist() == [0, 5, 1, 6, 2, 7, 3, 8, 4, 9]


@pytest.mark.parametrize("view", [lambda m: m, torch.t, lambda m: m[:, ::2]])
def test_masks_of_any_strides(view: object) -> None:
    mask = view(torch.rand(8, 8) < 0.5)  # type: ignore[operator]
    found = pattern_of(mask, mask)
    assert torch.equal(
        flat(found.forward, (1, 1), tuple(mask.shape)), mask.flatten().nonzero().squeeze(1)
    )


@pytest.mark.parametrize(("block", "count"), [((1, 1), 24), ((2, 2), 6)])
def test_more_blocks_than_an_index_counts_are_refused(
    block: tuple[int, int], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.ones(4, 6, dtype=torch.bool)
    monkeypatch.setattr(pattern, "INDEX_LIMIT", count - 1)
    with pytest.raises(
        ValueError, match=rf"shape \(4, 6\) has {count} blocks .* up to {count - 1}"
    ):
        pattern_of(mask, mask, block)
    monkeypatch.setattr(pattern, "INDEX_LIMIT", count)
    assert counted(pattern_of(mask, mask, block).forward) == count


def test_the_limit_is_that_of_the_dtype() -> None:
    assert np.iinfo(np.int32).max == pattern.INDEX_LIMIT


@pytest.mark.parametrize(
    ("values", "block"), [(integers(7), (1, 1)), (integers(7, 4, 2), (4, 2)), (integers(0), (1, 1))]
)
def test_values_tell_their_block(values: Tensor, block: tuple[int, int]) -> None:
    assert block_of(values) == block
