"""The strategies reach the cases they are meant to reach."""

from functools import partial

import torch
from hypothesis import find, given
from torch import Tensor

from tests.strategies import DTYPES, configs, weights
from topkast_func import TopKastConfig


def test_weights_reach_ties_zeros_and_thin_shapes() -> None:
    find(weights(), lambda w: w.numel() > 20 and w.unique().numel() == 3)
    find(weights(), lambda w: w.numel() > 4 and not w.any())
    find(weights(), lambda w: w.shape[:2] == (1, 1))
    find(weights(), lambda w: w.shape[0] == 1 and w.shape[1] > 3)
    find(weights(), lambda w: w.shape[1] == 1 and w.shape[0] > 3)
    find(weights(), lambda w: w.ndim == 4)


def has_dtype(dtype: torch.dtype, theta: Tensor) -> bool:
    return theta.dtype == dtype


def test_weights_reach_every_dtype() -> None:
    for dtype in DTYPES:
        find(weights(), partial(has_dtype, dtype))


@given(weights())
def test_weights_are_finite_floats(theta: Tensor) -> None:
    assert theta.is_floating_point()
    assert torch.isfinite(theta).all()
    assert theta.numel() > 0


def test_configs_reach_equal_and_different_sparsities() -> None:
    find(configs(), lambda c: c.forward_sparsity == c.backward_sparsity)
    find(configs(), lambda c: c.forward_sparsity != c.backward_sparsity)


@given(configs())
def test_configs_are_valid(config: TopKastConfig) -> None:
    assert config.penalty_weight >= 0
