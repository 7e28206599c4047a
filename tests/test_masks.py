"""Exact counts, the tie rule, blocks, and bad weights."""

import re

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from topkast_func import Masks, TopKastConfig, compute_masks
from topkast_func.testing import blocked, sparsities, weights
from topkast_func.types import BlockNorm


def masks_of(theta: Tensor, forward: float, backward: float, **fields: object) -> Masks:
    config = TopKastConfig(forward, backward, sparse="w", **fields)  # type: ignore[arg-type]
    return compute_masks({"w": theta}, config)["w"]


@given(weights(), sparsities(), sparsities())
@example(torch.zeros(1, 1), 0.999, 0.0)
@example(torch.ones(3, 3, dtype=torch.bfloat16), 0.5, 0.5)
def test_masks_equal_the_oracle(theta: Tensor, one: float, other: float) -> None:
    backward, forward = sorted((one, other))
    masks = masks_of(theta, forward, backward)
    values = theta.double().numpy()
    np.testing.assert_array_equal(masks.forward, reference.top_mask(values, forward))
    np.testing.assert_array_equal(masks.backward, reference.top_mask(values, backward))


@given(weights(), sparsities(), sparsities())
def test_counts_are_exact_and_a_lies_in_b(theta: Tensor, one: float, other: float) -> None:
    backward, forward = sorted((one, other))
    masks = masks_of(theta, forward, backward)
    assert masks.forward.dtype == masks.backward.dtype == torch.bool
    assert int(masks.forward.sum()) == reference.count(forward, theta.numel())
    assert int(masks.backward.sum()) == reference.count(backward, theta.numel())
    assert not (masks.forward & ~masks.backward).any()


@given(blocked(), sparsities(), sparsities(), st.sampled_from(["l2", "l1"]))
def test_blocks_equal_the_oracle(
    drawn: tuple[Tensor, tuple[int, int]], one: float, other: float, norm: BlockNorm
) -> None:
    theta, block = drawn
    backward, forward = sorted((one, other))
    masks = masks_of(theta, forward, backward, block_shape=block, block_norm=norm)
    for mask, sparsity in zip(masks, (forward, backward), strict=True):
        expected = reference.block_mask(theta.double().numpy(), sparsity, block, norm)
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_b_is_a_from_the_end_of_exploration_on(step: int) -> None:
    theta = {"weight": torch.randn(8, 8)}
    for until in (0, 1):
        config = TopKastConfig(0.9, 0.5, explore_until=until)
        masks = compute_masks(theta, config, step=step)["weight"]
        assert int(masks.forward.sum()) == 6
        assert int(masks.backward.sum()) == (6 if step >= until else 32)


def test_l1_and_l2_rank_blocks_differently() -> None:
    theta = torch.tensor([[3.0, 0.0, 2.0, 2.0]])  # norms: l2 3 and 2.83, l1 3 and 4
    by_l2 = masks_of(theta, 0.5, 0.5, block_shape=(1, 2), block_norm="l2")
    by_l1 = masks_of(theta, 0.5, 0.5, block_shape=(1, 2), block_norm="l1")
    assert by_l2.forward.tolist() == [[True, True, False, False]]
    assert by_l1.forward.tolist() == [[False, False, True, True]]


def test_ties_go_in_the_order_of_their_keys() -> None:
    """The flat indices 0 to 5 in the order of their keys are 3, 5, 4, 1, 2, 0."""
    theta = torch.tensor([[1.0, -2.0, 2.0], [2.0, -1.0, 1.0]])
    masks = masks_of(theta, forward=0.7, backward=0.4)
    assert masks.forward.tolist() == [[False, True, False], [True, False, False]]
    assert masks.backward.tolist() == [[False, True, True], [True, False, True]]


@pytest.mark.parametrize("value", [0.0, -0.5], ids=["zero", "constant"])
def test_the_sets_of_a_constant_weight_are_spread_over_its_rows_and_columns(value: float) -> None:
    """By the lowest flat index, B was the first 13 rows, whole, and no other."""
    for mask in masks_of(torch.full((64, 64), value), forward=0.9, backward=0.8):
        share = int(mask.sum()) / 64
        for axis in (0, 1):
            counts = mask.sum(axis)
            assert int(counts.min()) >= 1
            assert int(counts.max()) < 2.5 * share
            assert float(counts.float().std()) < 0.6 * share


@pytest.mark.parametrize("block", [(2, 2), (1, 4)])
def test_tied_blocks_go_in_the_order_of_the_keys_of_the_grid(block: tuple[int, int]) -> None:
    masks = masks_of(torch.ones(8, 16, 3), 0.75, 0.5, block_shape=block)
    grid = np.ones((8 // block[0], 16 // block[1], 3))
    for mask, sparsity in zip(masks, (0.75, 0.5), strict=True):
        found = mask[:: block[0], :: block[1]]
        np.testing.assert_array_equal(found, reference.top_mask(grid, sparsity))


def test_a_transposed_weight_is_ranked_by_its_own_rows() -> None:
    theta = torch.ones(2, 3).T
    assert not theta.is_contiguous()
    assert masks_of(theta, 0.5, 0.5).forward.tolist() == [[False] * 2, [False, True], [True, True]]


def test_more_entries_than_torch_quantile_takes() -> None:
    theta = torch.arange(2**24 + 1, dtype=torch.float64).float().view(1, -1)
    masks = masks_of(theta, 0.9, 0.8)
    assert int(masks.forward.sum()) == reference.count(0.9, theta.numel())
    assert int(masks.backward.sum()) == reference.count(0.8, theta.numel())
    assert masks.forward[0, -1]
    assert not masks.backward[0, 0]


def test_dense_leaves_are_absent_and_arguments_untouched() -> None:
    params = {"a.weight": torch.randn(4, 4), "a.bias": torch.randn(4)}
    before = {name: leaf.clone() for name, leaf in params.items()}
    assert list(compute_masks(params, TopKastConfig())) == ["a.weight"]
    assert all(torch.equal(params[name], before[name]) for name in params)


def test_parameters_that_require_a_gradient_are_fine() -> None:
    theta = torch.nn.Parameter(torch.randn(4, 4))
    assert not masks_of(theta, 0.5, 0.25).forward.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_nan_names_the_parameter(dtype: torch.dtype) -> None:
    theta = torch.randn(4, 4).to(dtype)
    theta[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"params\['w'\] holds NaN"):
        masks_of(theta, 0.9, 0.9)


def test_nan_in_a_dense_leaf_is_named_too() -> None:
    params = {"weight": torch.ones(2, 2), "bias": torch.tensor([1.0, float("nan")])}
    with pytest.raises(ValueError, match=r"params\['bias'\] holds NaN"):
        compute_masks(params, TopKastConfig())


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1.0, 1e200, 1e300])
def test_blocks_are_ranked_over_the_whole_range_of_double_precision(scale: float) -> None:
    theta = torch.tensor([[1.0, 1.0], [3.0, 1.0]], dtype=torch.float64) * scale
    for rows in (theta, theta.flip(0)):  # a tie would be of the same one in both
        masks = masks_of(rows, 0.5, 0.5, block_shape=(1, 2))
        assert torch.equal(masks.forward, (rows == 3 * scale).any(1, keepdim=True).expand(2, 2))


def test_infinity_ranks_first() -> None:
    theta = torch.tensor([[1.0, float("-inf"), 2.0, 3.0]])
    assert masks_of(theta, 0.75, 0.75).forward.tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (8,)])
def test_blocks_that_do_not_divide_name_key_shape_and_block(shape: tuple[int, ...]) -> None:
    message = f"block_shape=(2, 2) does not divide params['w'] of shape {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        masks_of(torch.ones(shape), 0.5, 0.5, block_shape=(2, 2))
