"""Which parameters are sparse, and with which sparsities."""

from typing import Any

import pytest
import torch
from torch import Tensor

from topkast_func import TopKastConfig
from topkast_func.allocation import Allocation, allocate, check_params, select


def tree() -> dict[str, Tensor]:
    return {
        "emb.weight": torch.zeros(5, 4),
        "fc1.weight": torch.zeros(4, 4),
        "fc1.bias": torch.zeros(4),
        "norm.weight": torch.zeros(4),
        "conv.weight": torch.zeros(2, 2, 3, 3),
        "attn.in_proj_weight": torch.zeros(12, 4),
        "table": torch.zeros(3, 3),
    }


def chosen(**fields: Any) -> list[str]:
    return select(tree(), TopKastConfig(**fields))


def test_by_default_weights_of_two_and_more_axes_are_sparse() -> None:
    assert chosen() == ["emb.weight", "fc1.weight", "conv.weight", "attn.in_proj_weight"]


def test_globs_select_and_the_order_is_that_of_the_parameters() -> None:
    assert chosen(sparse=["table", "fc1.*"]) == ["fc1.weight", "fc1.bias", "table"]
    assert chosen(sparse="fc?.weight") == ["fc1.weight"]


def test_a_predicate_selects_by_name_and_tensor() -> None:
    assert chosen(sparse=lambda name, leaf: leaf.ndim == 4) == ["conv.weight"]


@pytest.mark.parametrize("sparse", ["fc9*", ["fc1*", "fc9*"], lambda name, leaf: False])
def test_a_selection_of_nothing_lists_the_names_there_are(sparse: Any) -> None:
    with pytest.raises(ValueError, match=r"'emb.weight', 'fc1.weight', .*'table'"):
        chosen(sparse=sparse)


def test_no_weight_at_all_is_an_error_too() -> None:
    with pytest.raises(ValueError, match="selects no parameter; there are: 'bias'"):
        select({"bias": torch.zeros(3)}, TopKastConfig())


def test_sparsities_by_pattern_leave_the_unmatched_dense() -> None:
    config = TopKastConfig(forward_sparsity={"a*": 0.9, "b": 0.5}, backward_sparsity=0.25)
    assert allocate(["a1", "a2", "b", "c"], config) == {
        "a1": Allocation(0.9, 0.25),
        "a2": Allocation(0.9, 0.25),
        "b": Allocation(0.5, 0.25),
    }


@pytest.mark.parametrize(
    ("forward", "backward", "message"),
    [
        ({"z*": 0.9}, 0.5, r"forward_sparsity: 'z\*' matches no parameter; there are: 'a', 'b'"),
        ({"a": 0.9}, {"b": 0.5}, "backward_sparsity: 'b' matches no parameter"),
        (0.9, {"a": 0.5}, "no pattern of backward_sparsity matches 'b'"),
        ({"a": 0.9, "?": 0.8}, 0.5, r"gives 'a' both 0.9 and 0.8 \(pattern '\?'\)"),
        ({"a": 0.4}, 0.5, "backward_sparsity of 'a' must be in .*=0.4.*, got 0.5"),
    ],
)
def test_patterns_that_do_not_fit_name_the_parameter(
    forward: Any, backward: Any, message: str
) -> None:
    config = TopKastConfig(forward_sparsity=forward, backward_sparsity=backward)
    with pytest.raises(ValueError, match=message):
        allocate(["a", "b"], config)


def test_parameters_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(TypeError, match="params must map names to tensors, got list"):
        check_params([torch.zeros(2)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, r"params\['w'\] .*got torch.int64"),
        (torch.zeros(0, 3), ValueError, r"params\['w'\] is empty: its shape is \(0, 3\)"),
        ({"nested": torch.zeros(2)}, TypeError, r"params\['w'\] must be a tensor, got dict"),
        (None, TypeError, r"params\['w'\] must be a tensor, got NoneType"),
    ],
)
def test_a_bad_leaf_is_named(leaf: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_params({"ok": torch.zeros(2), "w": leaf})
