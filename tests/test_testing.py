"""The strategies reach the cases they are meant to reach, and the checks find what is wrong."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import Phase, find, given, settings
from torch import Tensor

import topkast_func as tk
from topkast_func import TopKastConfig
from topkast_func.testing import (
    DTYPES,
    blocked,
    check_counts,
    check_largest,
    check_nested,
    check_outside_untouched,
    configs,
    masks,
    patterned,
    weights,
)
from topkast_func.types import changed

reach = partial(find, settings=settings(max_examples=2000, phases=(Phase.generate,)))
"""Find an example; it need not be the smallest."""


def test_weights_reach_ties_zeros_and_thin_shapes() -> None:
    reach(weights(), lambda w: w.numel() > 20 and w.unique().numel() == 3)
    reach(weights(), lambda w: w.numel() > 4 and not w.any())
    reach(weights(), lambda w: w.shape[:2] == (1, 1))
    reach(weights(), lambda w: w.shape[0] == 1 and w.shape[1] > 3)
    reach(weights(), lambda w: w.shape[1] == 1 and w.shape[0] > 3)
    reach(weights(), lambda w: w.ndim == 4)


def test_weights_reach_what_only_their_own_dtype_tells_apart() -> None:
    doubles = weights(dtypes=(torch.float64,))
    reach(doubles, lambda w: w.unique().numel() > w.float().unique().numel())
    singles = weights(dtypes=(torch.float32,))
    reach(singles, lambda w: w.abs().unique().numel() > w.square().unique().numel())


def test_blocked_weights_are_divided_into_more_than_one_block() -> None:
    def several(drawn: tuple[Tensor, tuple[int, int]]) -> bool:
        theta, block = drawn
        return all(n > side > 1 for n, side in zip(theta.shape[:2], block, strict=True))

    reach(blocked(), several)


@given(blocked())
def test_blocks_divide_their_weights(drawn: tuple[Tensor, tuple[int, int]]) -> None:
    theta, (rows, columns) = drawn
    assert theta.shape[0] % rows == theta.shape[1] % columns == 0


def has_dtype(dtype: torch.dtype, theta: Tensor) -> bool:
    return theta.dtype == dtype


def test_weights_reach_every_dtype() -> None:
    for dtype in DTYPES:
        reach(weights(), partial(has_dtype, dtype))


@given(weights())
def test_weights_are_finite_floats(theta: Tensor) -> None:
    assert theta.is_floating_point()
    assert torch.isfinite(theta).all()
    assert theta.numel() > 0


def test_configs_reach_equal_and_different_sparsities() -> None:
    reach(configs(), lambda c: c.forward_sparsity == c.backward_sparsity)
    reach(configs(), lambda c: c.forward_sparsity != c.backward_sparsity)


@given(configs())
def test_configs_are_valid(config: TopKastConfig) -> None:
    assert config.penalty_weight >= 0


@given(masks())
def test_masks_are_nested(drawn: tk.Masks) -> None:
    check_nested({"w": drawn}, {"w": torch.zeros(drawn.forward.shape)})


PARAMS = {"w": torch.tensor([[3.0, -1.0, 2.0], [-2.0, 0.5, 0.0]])}
CONFIG = tk.TopKastConfig(0.7, 0.5, sparse="w")


def chosen() -> dict[str, tk.Masks]:
    return {n: tk.Masks(*map(torch.clone, m)) for n, m in tk.compute_masks(PARAMS, CONFIG).items()}


def test_right_masks_pass() -> None:
    check_nested(chosen(), PARAMS)
    check_counts(chosen(), PARAMS, CONFIG)
    check_largest(chosen(), PARAMS, CONFIG)


def test_an_entry_of_a_outside_b_is_found() -> None:
    wrong = chosen()
    wrong["w"].forward[1, 2] = True
    with pytest.raises(AssertionError, match="w: 1 entries of A are not in B"):
        check_nested(wrong, PARAMS)
    with pytest.raises(AssertionError, match=r"w: .*float"):
        check_nested({"w": tk.Masks(*(m.float() for m in chosen()["w"]))}, PARAMS)


def test_a_wrong_count_is_found() -> None:
    wrong = chosen()
    wrong["w"].backward[1, 2] = True
    with pytest.raises(AssertionError, match=r"w: \(2, 4\) entries in A and B, not \(2, 3\)"):
        check_counts(wrong, PARAMS, CONFIG)
    with pytest.raises(AssertionError, match=r"\[\] are sparse, not \['w'\]"):
        check_counts({}, PARAMS, CONFIG)


@pytest.mark.parametrize("place", [(0, 1), (0, 2)])
def test_a_smaller_entry_in_place_of_a_larger_is_found(place: tuple[int, int]) -> None:
    wrong = chosen()
    wrong["w"].forward[1, 0] = False
    wrong["w"].forward[place] = True
    with pytest.raises(
        AssertionError, match="w: an entry is in and one that ranks before it is not"
    ):
        check_largest(wrong, PARAMS, CONFIG)


def test_sets_of_another_shape_or_of_nan_are_no_largest() -> None:
    wide = {"w": tk.Masks(*(torch.tensor([[True, False]]) for _ in range(2)))}
    with pytest.raises(AssertionError, match=r"w: .*\[1, 2\]"):
        check_largest(wide, PARAMS, CONFIG)
    with pytest.raises(AssertionError, match="w holds NaN"):
        check_largest(chosen(), {"w": PARAMS["w"].clone().fill_(math.nan)}, CONFIG)


def test_a_block_that_is_in_by_a_part_is_found() -> None:
    config = TopKastConfig(0.5, 0.5, sparse="w", block_shape=(2, 2))
    theta = {"w": torch.arange(16.0).view(4, 4)}
    found = tk.compute_masks(theta, config)
    check_largest(found, theta, config)
    torn = found["w"].forward.clone()
    torn[1, 1], torn[3, 3] = True, False
    with pytest.raises(AssertionError, match="w: a block is in by a part of it"):
        check_largest({"w": tk.Masks(torn, torn)}, theta, config)


def test_after_exploration_b_counts_as_a() -> None:
    config, theta = TopKastConfig(0.75, 0.5, sparse="w", explore_until=5), {"w": torch.randn(4, 4)}
    explored = tk.compute_masks(theta, config)
    settled = {name: tk.Masks(m.forward, m.forward) for name, m in explored.items()}
    check_counts(explored, theta, config, step=4)
    check_counts(settled, theta, config, step=5)
    with pytest.raises(AssertionError, match="w: "):
        check_counts(explored, theta, config, step=5)


def test_sets_of_no_parameter_are_found() -> None:
    with pytest.raises(AssertionError, match="w is no parameter"):
        check_nested({"w": tk.Masks(torch.ones(2, 2) > 0, torch.ones(2, 2) > 0)}, {})


def test_an_entry_that_moved_outside_b_is_found() -> None:
    state = tk.init_state(PARAMS, CONFIG, tk.sgd(0.1), storage="dense")
    check_outside_untouched(state, state)
    moved = {"w": torch.where(tk.masks_of(state)["w"].backward, 9.0, PARAMS["w"])}
    check_outside_untouched(state, state._replace(weights=changed(state.weights, theta=moved)))
    other_zero = {"w": torch.where(tk.masks_of(state)["w"].backward, PARAMS["w"], -0.0)}
    zero = {"w": torch.where(tk.masks_of(state)["w"].backward, PARAMS["w"], 0.0)}
    at_zero, at_minus_zero = (
        state._replace(weights=changed(state.weights, theta=t)) for t in (zero, other_zero)
    )
    with pytest.raises(AssertionError, match="w: 3 entries outside B have moved"):
        check_outside_untouched(at_zero, at_minus_zero)
    nan = {"w": torch.where(tk.masks_of(state)["w"].backward, PARAMS["w"], math.nan)}
    unchanged = state._replace(weights=changed(state.weights, theta=nan))
    check_outside_untouched(unchanged, unchanged)
    wrong = {"w": PARAMS["w"] + 1}
    with pytest.raises(AssertionError, match="w: 3 entries outside B have moved"):
        check_outside_untouched(state, state._replace(weights=changed(state.weights, theta=wrong)))


def test_patterns_reach_several_groups_ties_and_kernels() -> None:
    def several(drawn: tuple[Tensor, TopKastConfig]) -> bool:
        theta, config = drawn
        return theta.shape[1] > (config.group or 0) and 0 < config.sparsities(0)[0] < 1  # type: ignore[operator]

    reach(patterned(), several)
    reach(patterned(), lambda d: d[0].ndim == 4 and d[0].unique().numel() < 4)
    reach(patterned(), lambda d: d[1].sparsities(0)[0] != d[1].sparsities(0)[1])


@pytest.mark.parametrize("check", [check_counts, check_largest])
def test_masks_of_numbers_are_named(check: Callable[..., None]) -> None:
    params, config = {"w.weight": torch.randn(8, 8)}, TopKastConfig(0.5)
    masks = tk.compute_masks(params, config)
    check(masks, params, config)
    numbers = {name: tk.Masks(*(mask.float() for mask in sets)) for name, sets in masks.items()}
    with pytest.raises(AssertionError, match=r"w\.weight: .*float32"):
        check(numbers, params, config)
