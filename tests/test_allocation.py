"""Which parameters are sparse, and with which sparsities."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import topkast_func as tk
from topkast_func import TopKastConfig
from topkast_func.config.allocation import allocate, shared
from topkast_func.config.selection import select
from topkast_func.ranking import kept
from topkast_func.sparsity import Allocation
from topkast_func.testing import sparsities
from topkast_func.trees import check_params


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
    with pytest.raises(
        ValueError, match=r"named …weight\) selects no parameter; there are: 'bias'"
    ):
        select({"bias": torch.zeros(3)}, TopKastConfig())


def test_weights_of_complex_numbers_are_named_where_there_are_no_others() -> None:
    told = "selects no parameter; 'weight' of complex numbers, which are trained densely; there are"
    with pytest.raises(ValueError, match=told):
        select({"weight": torch.zeros(4, 4, dtype=torch.complex64)}, TopKastConfig())


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (TopKastConfig(pattern="2:4"), r"parameter; pattern='2:4' divides none"),
        (TopKastConfig(block_shape=(4, 4)), r"parameter; block_shape=\(4, 4\) divides none"),
    ],
)
def test_what_divides_no_weight_is_named(config: TopKastConfig, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        select({"weight": torch.zeros(10, 13)}, config)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.gru, self.head = nn.Embedding(5, 4), nn.GRU(4, 6), nn.Linear(6, 2)


def test_of_a_recurrent_model_it_is_said_what_is_sparse_by_default_and_how_to_choose() -> None:
    config = TopKastConfig(keep_dense=["words.*", "head.*"])
    told = r"sparse=None \(every .* named …weight\) less keep_dense=.*; .* such as "
    with pytest.raises(ValueError, match=rf"{told}sparse='gru\.weight\*'; there are: 'words"):
        tk.init_state(Recurrent(), config, tk.sgd(0.1))
    config = TopKastConfig(sparse="gru.weight*")
    assert len(select(dict(Recurrent().named_parameters()), config)) == 2


@pytest.mark.parametrize(
    "begin",
    [lambda model, config: tk.init_state(model, config, tk.sgd(0.1)), tk.sparsify],
    ids=["state", "sparsify"],
)
def test_weights_that_are_dense_for_their_names_are_told_of(begin: Any) -> None:
    names = "their names do not end in 'weight': 'gru.weight_ih_l0', 'gru.weight_hh_l0'; "
    with pytest.warns(UserWarning, match=rf"{names}sparse='gru\.weight\*'") as told:
        begin(Recurrent(), TopKastConfig(keep_dense="head.*"))
    assert [Path(warning.filename).name for warning in told] == [Path(__file__).name]
    begin(Recurrent(), TopKastConfig(keep_dense=["head.*", "gru.*"]))
    begin(Recurrent(), TopKastConfig(sparse="*.weight"))


def test_sparsities_by_pattern_leave_the_unmatched_dense() -> None:
    config = TopKastConfig(forward_sparsity={"a*": 0.9, "b": 0.5}, backward_sparsity=0.25)
    assert shared(dict.fromkeys(["a1", "a2", "b", "c"], (4, 4)), config) == {
        "a1": Allocation(0.9, 0.25),
        "a2": Allocation(0.9, 0.25),
        "b": Allocation(0.5, 0.25),
    }


@pytest.mark.parametrize(
    ("forward", "backward", "message"),
    [
        (
            {"z*": 0.9},
            0.5,
            r"forward_sparsity: 'z\*' matches no selected parameter; there are: 'a', 'b'",
        ),
        ({"a": 0.9}, {"b": 0.5}, "backward_sparsity: 'b' matches no selected parameter"),
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
        shared({"a": (4, 4), "b": (4, 4)}, config)


def test_keep_dense_takes_away_and_the_helpers_name_first_and_last() -> None:
    ends = (tk.first_weight(tree()), tk.last_weight(tree()))
    assert ends == ("emb.weight", "attn.in_proj_weight")
    assert chosen(keep_dense=ends) == ["fc1.weight", "conv.weight"]
    assert chosen(keep_dense="emb.*") == ["fc1.weight", "conv.weight", "attn.in_proj_weight"]
    with pytest.raises(ValueError, match="keep_dense: 'emb' matches no parameter"):
        chosen(keep_dense="emb")
    with pytest.raises(ValueError, match=r"less keep_dense=\('\*',\) selects no parameter"):
        chosen(keep_dense="*")


def test_first_and_last_are_patterns_that_match_one_name_and_pass_over_what_is_frozen() -> None:
    weights = {name: torch.zeros(3, 3) for name in ("a[b].weight", "ab.weight", "c.weight")}
    first = tk.first_weight(weights)
    assert [*allocate(weights, TopKastConfig(keep_dense=first))] == ["ab.weight", "c.weight"]
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    assert tk.first_weight(dict(model.named_parameters())) == "1.weight"
    assert tk.first_weight({n: p.detach() for n, p in model.named_parameters()}) == "0.weight"
    with pytest.raises(TypeError, match="params must map names to tensors, got Sequential"):
        tk.last_weight(model)  # type: ignore[arg-type]


def test_by_default_a_weight_that_blocks_do_not_divide_is_dense() -> None:
    assert chosen(block_shape=(4, 2)) == ["fc1.weight", "attn.in_proj_weight"]


def test_without_a_weight_there_is_no_first() -> None:
    with pytest.raises(ValueError, match="no parameter is a weight; there are: 'bias'"):
        tk.first_weight({"bias": torch.zeros(3)})


def sizes() -> st.SearchStrategy[dict[str, tuple[int, ...]]]:
    shape = st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple)
    return st.dictionaries(st.sampled_from("abcdef"), shape, min_size=1)


@given(sizes(), sparsities(), sparsities())
def test_erk_spends_the_budget_exactly(
    shapes: dict[str, tuple[int, ...]], one: float, other: float
) -> None:
    backward, forward = sorted((one, other))
    config = TopKastConfig(forward, backward, allocation="erk")
    allocations = shared(shapes, config)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    before = dict.fromkeys(shapes, 1)
    for which, sparsity in enumerate((forward, backward)):
        counts = {name: kept(a[which], sizes[name]) for name, a in allocations.items()}
        assert all(before[name] <= counts[name] <= sizes[name] for name in shapes)
        asked = kept(sparsity, sum(sizes.values()))
        assert sum(counts.values()) == max(asked, sum(before.values()))
        before = counts


def test_erk_follows_the_rule_up_to_one_entry_and_dense_tensors_leave_the_rest() -> None:
    shapes = {"wide": (400, 300), "conv": (20, 10, 3, 3), "small": (10, 5)}
    allocations = shared(shapes, TopKastConfig(0.9, 0.8, allocation="erk"))
    scores = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert allocations["small"] == (0.0, 0.0)
    left = 0.1 * sum(sizes.values()) - sizes["small"]
    scale = left / sum(scores[name] * sizes[name] for name in ("wide", "conv"))
    for name in ("wide", "conv"):
        wanted = scale * scores[name] * sizes[name]
        assert abs(allocations[name].forward_density * sizes[name] - wanted) < 1.0


def test_erk_counts_blocks() -> None:
    shapes = {"a": (16, 16), "b": (4, 16)}
    config = TopKastConfig(0.75, 0.5, allocation="erk", block_shape=(4, 4))
    counts = [
        round(a.forward_density * math.prod(shapes[n]) / 16, 9)
        for n, a in shared(shapes, config).items()
    ]
    assert sum(counts) == 5
    assert all(count == int(count) for count in counts)


@pytest.mark.parametrize("shape", [(2, 4), (4,), (4, 6)])
def test_erk_names_a_tensor_that_blocks_do_not_divide(shape: tuple[int, ...]) -> None:
    config = TopKastConfig(0.75, 0.5, allocation="erk", block_shape=(4, 4))
    with pytest.raises(ValueError, match=r"block_shape=\(4, 4\) does not divide params\['b'\]"):
        shared({"a": (16, 16), "b": shape}, config)


def test_erk_keeps_a_scalar_beside_full_tensors() -> None:
    config = TopKastConfig(0.0, 0.0, allocation="erk")
    assert shared({"a": (8, 8), "scale": ()}, config) == dict.fromkeys(("a", "scale"), (0.0, 0.0))


def test_densities_by_pattern_and_the_others_uniform() -> None:
    config = TopKastConfig(0.9, 0.8, allocation={"a": 0.3, "b": 0.7})
    found = shared(dict.fromkeys("abc", (10, 10)), config)
    assert found["a"] == pytest.approx((0.7, 0.4))
    assert found["b"] == pytest.approx((0.3, 0.0))
    assert found["c"] == (0.9, 0.8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allocation": "er"}, "allocation must be one of .*'uniform', 'erk'.*, got 'er'"),
        ({"allocation": {"a": 0.0}}, r"allocation\['a'\] must be in \(0, 1\], got 0.0"),
        ({"allocation": {}}, "allocation must name at least one pattern"),
        (
            {"allocation": "erk", "forward_sparsity": {"a": 0.9}},
            "shares out one forward_sparsity, not a mapping",
        ),
        (
            {"allocation": "erk", "backward_sparsity": {"a": 0.8}},
            "shares out one backward_sparsity, not a mapping",
        ),
    ],
)
def test_bad_allocations_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKastConfig(**fields)


def test_allocated_densities_that_overlap_or_match_nothing_are_named() -> None:
    shapes = {"a": (4, 4), "b": (4, 4)}
    with pytest.raises(ValueError, match=r"allocation gives 'a' both 0\.5 and 0\.25"):
        shared(shapes, TopKastConfig(allocation={"a": 0.5, "?": 0.25}))
    with pytest.raises(ValueError, match="allocation: 'z' matches no selected parameter"):
        shared(shapes, TopKastConfig(allocation={"z": 0.5}))


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
