"""The seed's loss: its value, its gradient, and what it takes."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from tests import reference
from topkast_func import TopKastConfig, TopKastLinear, TopKastLoss, sparsify, testing


def _masks(layer: TopKastLinear) -> tuple[reference.Mask, reference.Mask]:
    masks = np.zeros((2, *layer.weight.shape), bool)
    masks[0][tuple(axis.numpy() for axis in layer.idx_fwd)] = True
    masks[1][tuple(axis.numpy() for axis in layer.idx_bwd)] = True
    return masks[0], masks[1]


def _penalty(layer: TopKastLinear) -> float:
    theta = layer.weight.detach().double().numpy()
    return reference.penalty("group_l2", theta, *_masks(layer), 1 - layer.p_forward)


def _layers() -> tuple[TopKastLinear, nn.Linear, TopKastLinear]:
    first, dense, last = TopKastLinear(6, 5, 0.6, 0.3), nn.Linear(5, 4), TopKastLinear(4, 1, 0.5, 0)
    return first.double(), dense.double(), last.double()


def _net() -> nn.Sequential:
    first, dense, last = _layers()
    return nn.Sequential(first, nn.ReLU(), dense, last)


def _batch() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 6).double(), torch.randn(7, 1).double()


def test_arguments_are_the_seeds() -> None:
    assert [(p.name, p.default) for p in inspect.signature(TopKastLoss).parameters.values()] == [
        ("loss", inspect.Parameter.empty),
        ("net", inspect.Parameter.empty),
        ("alpha", 1),
        ("device", None),
    ]


def _expected(first: TopKastLinear, dense: nn.Linear, last: TopKastLinear) -> float:
    frobenius = float(np.sqrt((dense.weight.detach().numpy() ** 2).sum()))
    return _penalty(first) + frobenius + _penalty(last)


@pytest.mark.parametrize("alpha", [0.4, 1])
def test_value_is_the_seeds(alpha: float) -> None:
    first, dense, last = _layers()
    net, (inputs, target) = nn.Sequential(first, nn.ReLU(), dense, last), _batch()
    expected = mse_loss(net(inputs), target).item() + alpha * _expected(first, dense, last)
    found = TopKastLoss(loss=nn.MSELoss, net=net, alpha=alpha, device=None)(net(inputs), target)
    assert found.ndim == 0
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_alpha_is_one_if_not_given() -> None:
    loss = TopKastLoss(nn.MSELoss, net := _net())
    target = torch.zeros(1, 1).double()
    assert torch.equal(loss(target, target), loss.compute_norm_active_set())
    assert loss.net is net
    assert loss.alpha == 1


def test_alpha_zero_is_the_bare_loss() -> None:
    net, (inputs, target) = _net(), _batch()
    found = TopKastLoss(nn.MSELoss, net, alpha=0)(net(inputs), target)
    assert torch.equal(found, mse_loss(net(inputs), target))


@given(
    testing.weights(testing.shapes(ndim=2), (torch.float64,), testing.MODERATE),
    st.tuples(testing.sparsities(), testing.sparsities()).map(sorted),
)
def test_penalty_and_its_gradient_are_those_of_the_formula(
    theta: Tensor, sparsities: list[float]
) -> None:
    p_backward, p_forward = sparsities
    rows, columns = theta.shape
    layer = TopKastLinear(columns, rows, p_forward, p_backward, dtype=torch.float64)
    layer.weight = theta
    layer.update_active_param_set()
    layer(torch.zeros(columns, dtype=torch.float64))
    penalty = TopKastLoss(nn.MSELoss, layer).compute_norm_active_set()
    torch.testing.assert_close(penalty.detach(), torch.tensor(_penalty(layer)).double())
    penalty.backward()  # type: ignore[no-untyped-call]
    dense = torch.from_numpy(
        reference.penalty_gradient("group_l2", theta.numpy(), *_masks(layer), 1 - p_forward)
    )
    torch.testing.assert_close(layer.weight.grad, dense)


def test_penalty_follows_training() -> None:
    layers, (inputs, target) = _layers(), _batch()
    net = nn.Sequential(*layers)
    loss = TopKastLoss(nn.MSELoss, net, alpha=0.1)
    before = loss.compute_norm_active_set().item()
    loss(net(inputs), target).backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    after = loss.compute_norm_active_set().item()
    assert after != before
    assert after == pytest.approx(_expected(*layers), rel=1e-12)


def test_a_write_in_place_is_penalised_before_the_next_forward() -> None:
    layer = TopKastLinear(6, 5, 0.6, 0.3)
    nn.init.constant_(layer.weight, 2.0)
    penalty = TopKastLoss(nn.MSELoss, layer).compute_norm_active_set()
    torch.testing.assert_close(penalty.detach().double(), torch.tensor(_penalty(layer)).double())


def test_defect_07_nested_layers_are_penalised() -> None:
    flat = _net()
    nested = nn.Sequential(nn.ModuleDict({"body": nn.Sequential(*flat)}))
    found = TopKastLoss(nn.MSELoss, nested).compute_norm_active_set()
    assert found > 1
    assert torch.equal(found, TopKastLoss(nn.MSELoss, flat).compute_norm_active_set())


def test_a_layer_that_is_the_whole_net_is_penalised() -> None:
    layer = TopKastLinear(6, 5, 0.6, 0.3).double()
    penalty = TopKastLoss(nn.MSELoss, layer).compute_norm_active_set().item()
    assert penalty == pytest.approx(_penalty(layer), rel=1e-12)


def test_every_module_with_a_weight_counts_once_and_biases_do_not() -> None:
    shared, norm, convolution = nn.Linear(3, 3), nn.LayerNorm(3), nn.Conv1d(3, 2, 2)
    net = nn.Sequential(shared, nn.ReLU(), shared, norm, convolution)
    weights = (shared.weight, norm.weight, convolution.weight)
    expected = torch.stack([weight.square().sum().sqrt() for weight in weights]).sum()
    torch.testing.assert_close(TopKastLoss(nn.MSELoss, net).compute_norm_active_set(), expected)


def test_a_net_without_weights_has_no_penalty() -> None:
    assert TopKastLoss(nn.MSELoss, nn.ReLU()).compute_norm_active_set() == 0


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss, nn.CrossEntropyLoss(), cross_entropy],
    ids=["class", "object", "function"],
)
def test_loss_may_be_a_class_an_object_or_a_function(loss: Callable[..., Any]) -> None:
    net, target = TopKastLinear(6, 3, 0.5, 0.5), torch.tensor([0, 2])
    y_hat = net(torch.randn(2, 6))
    found = TopKastLoss(loss, net, alpha=0)(y_hat, target)
    assert torch.equal(found, cross_entropy(y_hat, target))


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan, math.inf])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha must be in \[0, 1\], got {alpha!r}"):
        TopKastLoss(nn.MSELoss, _net(), alpha=alpha)


@pytest.mark.parametrize("alpha", [True, "1", None])
def test_alpha_that_is_no_number_is_refused(alpha: Any) -> None:
    with pytest.raises(TypeError, match=rf"alpha must be a number in .*, got {alpha!r}"):
        TopKastLoss(nn.MSELoss, _net(), alpha=alpha)


def test_a_loss_that_cannot_be_called_and_a_net_that_is_no_module_are_named() -> None:
    loss: Any = "mse"
    with pytest.raises(TypeError, match="loss must be callable, got str"):
        TopKastLoss(loss, _net())
    for net in (None, _net().parameters()):
        with pytest.raises(TypeError, match=r"net must be a Module, got (NoneType|generator)"):
            TopKastLoss(nn.MSELoss, net)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    layer = TopKastLinear(256, 256, 0.99, 0.2, dtype=dtype)
    layer.weight = (3 * torch.randn(256, 256)).to(dtype)
    layer.update_active_param_set()
    theta, (forward, backward) = layer.weight.detach().double(), layer.masks
    right = (theta * forward).norm() + (theta * (backward & ~forward)).norm() / 0.01
    dense = nn.Linear(256, 256, dtype=dtype)
    found = TopKastLoss(nn.MSELoss, nn.Sequential(layer, dense)).compute_norm_active_set()
    torch.testing.assert_close(
        found.double(), right + dense.weight.double().norm(), rtol=1e-5, atol=0
    )


def test_a_weight_that_layers_share_counts_once() -> None:
    embedding, head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
    head.weight = embedding.weight
    net = nn.Sequential(embedding, head)
    norm = TopKastLoss(nn.MSELoss, net).compute_norm_active_set()
    assert norm == embedding.weight.norm()
    sparsifier = sparsify(net, TopKastConfig(0.8, 0.6, penalty="group_l2", penalty_weight=1.0))
    torch.testing.assert_close(
        TopKastLoss(nn.MSELoss, net).compute_norm_active_set(), sparsifier.penalty()
    )
