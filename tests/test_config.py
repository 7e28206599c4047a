"""Every range of a configuration, and what makes it usable as a constant."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch

import topkast_func as tk
from topkast_func import TopKastConfig

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"forward_sparsity": 1.0}, ValueError, r"forward_sparsity must be in \[0.0, 1.0\), got 1.0"),
    ({"forward_sparsity": -0.1}, ValueError, r"forward_sparsity must be in \[0.0, 1.0\)"),
    ({"forward_sparsity": float("nan")}, ValueError, "forward_sparsity .* got nan"),
    ({"forward_sparsity": True}, TypeError, "forward_sparsity must be a number .* got True"),
    ({"forward_sparsity": "0.9"}, TypeError, "forward_sparsity must be a number .* got '0.9'"),
    ({"backward_sparsity": "0.5"}, TypeError, "backward_sparsity must be a number"),
    ({"forward_sparsity": {"a": 2}}, ValueError, r"forward_sparsity\['a'\] must be in"),
    ({"forward_sparsity": {3: 0.9}}, TypeError, "the keys of forward_sparsity must be glob"),
    ({"forward_sparsity": {}}, ValueError, "forward_sparsity must name at least one pattern"),
    (
        {"forward_sparsity": 0.5, "backward_sparsity": 0.6},
        ValueError,
        r"backward_sparsity must be in \[0, forward_sparsity=0.5\], got 0.6",
    ),
    ({"sparse": 3}, TypeError, "sparse must be None, a glob pattern"),
    ({"sparse": [1]}, TypeError, "sparse must be None, a glob pattern"),
    ({"sparse": []}, ValueError, "sparse must name at least one pattern"),
    ({"refresh_every": 0}, ValueError, "refresh_every must be at least 1, got 0"),
    ({"refresh_every": 1.5}, TypeError, "refresh_every must be an integer of at least 1"),
    ({"refresh_every": True}, TypeError, "refresh_every must be an integer"),
    ({"explore_until": -1}, ValueError, "explore_until must be at least 0, got -1"),
    (
        {"forward_sparsity": tk.staged({0: 0.5, 10: 0.8}), "explore_until": 10},
        ValueError,
        "a sparsity changes at step 10, but from explore_until=10 on the sets stay",
    ),
    ({"penalty": "l3"}, ValueError, "penalty must be one of .*'group_l2', None.*, got 'l3'"),
    ({"penalty_weight": -1.0}, ValueError, r"penalty_weight must be in \[0.0, inf\)"),
    ({"penalty_weight": float("inf")}, ValueError, "penalty_weight"),
    ({"block_shape": 4}, TypeError, "block_shape must be a pair"),
    ({"block_shape": (4, 0)}, ValueError, "block_shape must be at least 1, got 0"),
    ({"block_shape": (4, 1, 1)}, TypeError, "block_shape must be a pair"),
    ({"block_norm": "linf"}, ValueError, "block_norm must be one of"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD)
def test_a_bad_field_is_named_with_its_range_and_value(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TopKastConfig(**fields)


def test_a_configuration_is_frozen_and_hashable() -> None:
    config = TopKastConfig(forward_sparsity={"a*": 0.9}, backward_sparsity={"a*": 0.5})
    same = TopKastConfig(forward_sparsity={"a*": 0.9}, backward_sparsity={"a*": 0.5})
    assert config == same
    assert hash(config) == hash(same)
    with pytest.raises(FrozenInstanceError):
        config.penalty = None  # type: ignore[misc]


def test_a_later_change_of_the_callers_mapping_does_not_reach_the_configuration() -> None:
    sparsity = {"a": 0.9}
    config = TopKastConfig(forward_sparsity=sparsity)
    sparsity["a"] = 0.1
    assert dict(config.forward_sparsity) == {"a": 0.9}  # type: ignore[arg-type]


def test_a_configuration_can_be_replaced_field_by_field() -> None:
    config = TopKastConfig(sparse=["a", "b"], forward_sparsity={"a": 0.9, "b": 0.95})
    assert replace(config, penalty=None).forward_sparsity == {"a": 0.9, "b": 0.95}
    assert replace(config, penalty=None).sparse == ("a", "b")


def test_numpy_numbers_are_numbers() -> None:
    config = TopKastConfig(
        forward_sparsity=np.float64(0.75),
        backward_sparsity=np.float32(0.5),
        refresh_every=np.int64(3),
    )
    assert (config.forward_sparsity, config.backward_sparsity) == (0.75, 0.5)
    assert (type(config.forward_sparsity), type(config.refresh_every)) == (float, int)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (0.9, 0.8),
        (0.5, 0.0),
        (0.3, 0.0),
        (0.95, 0.9),
    ],
)
def test_b_is_twice_as_large_as_a_unless_it_is_given(forward: float, expected: float) -> None:
    config = TopKastConfig(forward)
    assert config.backward_sparsity is None
    assert config.sparsities(0)[1] == pytest.approx(expected)


def test_b_is_twice_as_large_as_a_by_pattern_and_over_time() -> None:
    by_pattern = TopKastConfig({"a*": 0.9, "b*": 0.4}).sparsities(0)[1]
    assert dict(by_pattern) == {"a*": pytest.approx(0.8), "b*": 0.0}  # type: ignore[arg-type]
    staged = TopKastConfig(tk.staged({0: 0.5, 10: 0.75}))
    assert [staged.sparsities(t)[1] for t in (0, 10)] == [0.0, 0.5]


def test_refreshes_may_be_rarer_from_a_step_on() -> None:
    schedule = TopKastConfig(refresh_every={0: 1, 5: 4, 14: None}).schedule
    assert [t for t in range(30) if schedule.refreshes_at(t)] == [1, 2, 3, 4, 8, 12]


@pytest.mark.parametrize(
    ("every", "error", "message"),
    [
        ({}, ValueError, "must say what holds from step 0 on"),
        ({10: 1}, ValueError, "must say what holds from step 0 on"),
        ({0: 0}, ValueError, r"refresh_every\[0\] must be at least 1, got 0"),
        ({-1: 1, 0: 1}, ValueError, "a step of refresh_every must be at least 0"),
        ({0: 1, "5": 2}, TypeError, "a step of refresh_every must be an integer"),
    ],
)
def test_bad_intervals_are_refused(every: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        TopKastConfig(refresh_every=every)


def test_a_pattern_that_is_a_name_matches_it_though_it_has_brackets() -> None:
    params = {name: torch.randn(4, 4) for name in ("a[1].weight", "a1.weight")}
    given: list[dict[str, Any]] = [
        {"sparse": "a[1].weight"},
        {"forward_sparsity": {"a[1].weight": 0.5}, "backward_sparsity": 0.25},
        {"keep_dense": "a1.weight"},
    ]
    for fields in given:
        assert "a[1].weight" in tk.compute_masks(params, TopKastConfig(**fields))
    config = TopKastConfig(keep_dense="a[1].weight")
    params["other.weight"] = torch.randn(4, 4)
    told = tk.summary(tk.init_state(params, config, tk.sgd(0.1)), config=config)
    assert told.notes[0] == "dense: a[1].weight, a1.weight: keep_dense"
    groups = tk.partition({"a[1].weight": tk.sgd(0.1), "*": tk.adam()})
    assert groups.init({"a[1].weight": params["a[1].weight"], "b": torch.ones(1)}).slots.keys()


def test_a_stage_begins_with_the_step_that_it_starts_at() -> None:
    schedule = TopKastConfig(tk.staged({0: 0.5, 3: 0.8, 7: 0.9}), 0.2).schedule
    assert [schedule.stage(step) for step in (0, 2, 3, 6, 7, 9)] == [0, 0, 3, 3, 7, 7]
