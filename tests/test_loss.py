"""The penalty in its three forms against its closed form, and the loss around it."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.func import grad

from tests import reference
from topkast_func import (
    TopKastConfig,
    compute_masks,
    exploration_penalty,
    penalized_loss,
    sparse_forward,
)
from topkast_func.config.fields import Penalty
from topkast_func.testing import MODERATE, configs, weights

FORMS = get_args(Penalty)


def mse(apply: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(apply(batch[0]), batch[1])


@given(weights(dtypes=(torch.float64,), entries=MODERATE), configs())
def test_value_and_gradient_equal_the_closed_form(theta: Tensor, config: TopKastConfig) -> None:
    params = {"weight": theta}
    masks = compute_masks(params, config)
    found = exploration_penalty(params, masks, config)
    gradient = grad(lambda p: exploration_penalty(p, masks, config))(params)["weight"]
    if config.penalty is None:
        assert found == 0
        assert not gradient.any()
        return
    density = 1.0 - config.forward_sparsity  # type: ignore[operator]
    forward, backward = (mask.numpy() for mask in masks["weight"])
    value = reference.penalty(config.penalty, theta.numpy(), forward, backward, density)
    slope = reference.penalty_gradient(config.penalty, theta.numpy(), forward, backward, density)
    np.testing.assert_allclose(found.item(), value, rtol=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slope, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_is_zero_where_a_norm_is_zero(form: Penalty, compiled: bool) -> None:
    params = {"weight": torch.zeros(4, 4)}
    config = TopKastConfig(0.75, 0.25, penalty=form)
    masks = compute_masks(params, config)
    gradient = grad(lambda p: exploration_penalty(p, masks, config))
    run = torch.compile(gradient, fullgraph=True) if compiled else gradient
    assert torch.equal(run(params)["weight"], torch.zeros(4, 4))


def test_each_tensor_has_its_own_density_and_dense_ones_have_no_penalty() -> None:
    params = {"a": torch.ones(2, 5), "b": torch.ones(2, 5), "bias": torch.full((9,), 7.0)}
    config = TopKastConfig({"a": 0.9, "b": 0.5}, 0.2, sparse=["a", "b"], penalty="l1")
    masks = compute_masks(params, config)
    expected = (1 + 7 / 0.1) + (5 + 3 / 0.5)
    torch.testing.assert_close(exploration_penalty(params, masks, config), torch.tensor(expected))


def test_a_masked_parameter_without_a_sparsity_is_named() -> None:
    params = {"a": torch.ones(2, 5), "b": torch.ones(2, 5)}
    masks = compute_masks(params, TopKastConfig(0.8, 0.5, sparse="*"))
    with pytest.raises(ValueError, match=r"gives \['b'\] no sparsity"):
        exploration_penalty(params, masks, TopKastConfig({"a": 0.8}, 0.5))


def test_half_precision_weights_are_summed_in_single_precision() -> None:
    params = {"weight": torch.ones(64, 64, dtype=torch.bfloat16)}
    config = TopKastConfig(0.0, 0.0, penalty="l1")
    found = exploration_penalty(params, compute_masks(params, config), config)
    assert found.dtype == torch.float32
    assert found == 4096


@pytest.mark.parametrize("form", [*FORMS, None])
def test_the_loss_is_the_data_loss_plus_the_weighted_penalty(form: Penalty | None) -> None:
    model = nn.Linear(6, 4)
    params = {name: p.detach() for name, p in model.named_parameters()}
    config = TopKastConfig(0.7, 0.4, penalty=form, penalty_weight=0.3)
    masks = compute_masks(params, config)
    batch = (torch.randn(5, 6), torch.randn(5, 4))
    data_loss = mse(lambda x: sparse_forward(model, params, masks, x), batch)
    expected = data_loss + 0.3 * exploration_penalty(params, masks, config)
    found = penalized_loss(model, mse, params, masks, batch, config)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_gradient_equals_eager(form: Penalty) -> None:
    model = nn.Linear(6, 4)
    params = {name: p.detach() for name, p in model.named_parameters()}
    config = TopKastConfig({"w*": 0.7}, {"w*": 0.4}, penalty=form, penalty_weight=0.3)
    masks = compute_masks(params, config)
    batch = (torch.randn(5, 6), torch.randn(5, 4))
    gradient = grad(lambda p: penalized_loss(model, mse, p, masks, batch, config))
    eager = gradient(params)
    exploring = masks["weight"].backward & ~masks["weight"].forward
    assert eager["weight"][exploring].abs().min() > 0
    compiled = torch.compile(gradient, fullgraph=True)(params)
    for name in params:
        torch.testing.assert_close(compiled[name], eager[name])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda apply, x: apply(x), r"loss_fn must return a 0-d tensor, got shape \(5, 4\)"),
        (lambda apply, x: 1.0, "loss_fn must return a 0-d tensor, got float"),
        (lambda apply, x: apply(x).argmax(), "a real floating-point number, got torch.int64"),
        (lambda apply, x: apply(x).sum() * 1j, "a real floating-point number, got torch.complex64"),
        (lambda apply, x: apply(x).sum().reshape(1), r"got shape \(1,\)"),
    ],
)
def test_a_loss_that_is_no_scalar_is_a_type_error(loss: Any, message: str) -> None:
    model = nn.Linear(6, 4)
    params = {name: p.detach() for name, p in model.named_parameters()}
    config = TopKastConfig()
    with pytest.raises(TypeError, match=message):
        penalized_loss(
            model, loss, params, compute_masks(params, config), torch.randn(5, 6), config
        )
