"""Sparsities in stages, and the cubic of gradual pruning."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import topkast_func as tk
from topkast_func.testing import sparsities


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.5), (9, 0.5), (10, 0.8), (99, 0.8), (100, 0.9)]
)
def test_a_stage_lasts_until_the_next(step: int, expected: float) -> None:
    assert tk.staged({100: 0.9, 0: 0.5, 10: 0.8}).at(step) == expected


@given(sparsities(), sparsities(), st.integers(0, 50), st.integers(1, 200), st.integers(1, 12))
def test_the_cubic_starts_and_ends_where_it_is_told(
    initial: float, final: float, begin: int, length: int, stages: int
) -> None:
    schedule = tk.cubic(initial, final, begin, begin + length, stages)
    assert schedule.at(0) == pytest.approx(initial)
    assert schedule.at(max(begin - 1, 0)) == pytest.approx(initial)
    assert schedule.at(begin + length) == pytest.approx(final)
    for start in schedule.steps:
        way = min(max((start - begin) / length, 0.0), 1.0)
        exact = final + (initial - final) * (1 - way) ** 3
        assert abs(schedule.at(start) - exact) <= 3 * abs(final - initial) / length
    assert len(schedule.steps) <= stages + 1


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ({}, ValueError, "one stage must start at step 0"),
        ({5: 0.5}, ValueError, r"one stage must start at step 0, got stages at \[5\]"),
        ({0: 1.0}, ValueError, r"staged\[0\] must be in \[0.0, 1.0\), got 1.0"),
        ({0: 0.5, -1: 0.5}, ValueError, "a step of staged must be at least 0"),
        ({0: 0.5, 1.5: 0.5}, TypeError, "a step of staged must be an integer"),
        ({0: "x"}, TypeError, r"staged\[0\] must be a number"),
    ],
)
def test_bad_stages_are_named(stages: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tk.staged(stages)


@pytest.mark.parametrize(
    ("steps", "sparsities", "error", "message"),
    [
        ((10, 20), (0.5, 0.9), ValueError, r"must start at step 0, got stages at \[10, 20\]"),
        ((), (), ValueError, r"must start at step 0, got stages at \[\]"),
        (
            (0, 4, 4),
            (0.5, 0.6, 0.7),
            ValueError,
            r"start at different steps, got stages at \[0, 4, 4\]",
        ),
        ((0, 4), (0.5,), ValueError, r"got steps \(0, 4\) and sparsities \(0.5,\)"),
        ((0,), (0.5, 0.9), ValueError, r"got steps \(0,\) and sparsities \(0.5, 0.9\)"),
        ((0, 4), (0.5, math.nan), ValueError, r"staged\[4\] must be in \[0.0, 1.0\), got nan"),
        ((0, -1), (0.5, 0.9), ValueError, "a step of staged must be at least 0, got -1"),
        ((0, 1.5), (0.5, 0.9), TypeError, "a step of staged must be an integer"),
        ((0,), ("x",), TypeError, r"staged\[0\] must be a number"),
        (0, (0.5,), TypeError, "steps must be a Sequence, got int"),
        ((0,), 0.5, TypeError, "sparsities must be a Sequence, got float"),
    ],
)
def test_stages_of_steps_and_sparsities_are_checked_alike(
    steps: Any, sparsities: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tk.Staged(steps, sparsities)


def test_stages_in_any_order_and_numbers_are_those_of_staged() -> None:
    stages = tk.staged({0: 0.5, 4: 0.75})
    steps: Any = (np.int64(4), np.int8(0))
    for found in (tk.Staged((4, 0), (0.75, 0.5)), tk.Staged(steps, (np.float32(0.75), 0.5))):
        assert (found, hash(found), repr(found)) == (stages, hash(stages), repr(stages))


def test_bad_cubics_are_named() -> None:
    with pytest.raises(ValueError, match="end must be at least 11, got 10"):
        tk.cubic(0.0, 0.9, 10, 10)
    with pytest.raises(ValueError, match=r"final must be in \[0.0, 1.0\)"):
        tk.cubic(0.0, 1.0, 0, 10)


def test_a_configuration_at_a_step_has_the_sparsities_of_its_stage() -> None:
    forward = tk.staged({0: 0.5, 10: 0.9})
    config = tk.TopKastConfig(forward, tk.staged({0: 0.25, 5: 0.5}))
    assert config.schedule.starts == (5, 10)
    assert [config.sparsities(t)[0] for t in (0, 9, 10)] == [0.5, 0.5, 0.9]
    assert [config.sparsities(t)[1] for t in (4, 5, 50)] == [0.25, 0.5, 0.5]


def test_stages_that_leave_a_outside_b_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"backward_sparsity at step 10 must be in .*=0.5.*, got 0.6"
    ):
        tk.TopKastConfig(tk.staged({0: 0.9, 10: 0.5}), 0.6)


@pytest.mark.parametrize(
    "fields",
    [
        {"forward_sparsity": tk.staged({0: 0.5, 10: 0.9}), "backward_sparsity": 0.4},
        {"method": tk.gmp(0, 10)},
    ],
)
@pytest.mark.parametrize("until", [0, 5, 10])
def test_a_change_after_the_sets_are_settled_is_refused(fields: Any, until: int) -> None:
    with pytest.raises(ValueError, match=f"changes at step 10, .* explore_until={until} on"):
        tk.TopKastConfig(**fields, explore_until=until)
    tk.TopKastConfig(**fields, explore_until=11)


def test_densities_by_pattern_have_no_stages() -> None:
    forward = tk.staged({0: 0.5, 10: 0.9})
    with pytest.raises(ValueError, match="an allocation by pattern fixes densities"):
        tk.TopKastConfig(forward, 0.4, allocation={"weight": 0.2})
