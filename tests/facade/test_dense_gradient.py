"""The gradient of every entry is that of the step, or none."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import topkast_func as tk

CONFIG = tk.TopKastConfig(0.75, refresh_every=None, method=tk.rigl())


def _chain() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False))
    return model, tk.sparsify(model, CONFIG)


def _gradients(model: nn.Module) -> list[Tensor | None]:
    """Return the gradients of every entry that a refresh would read."""
    layers: list[Any] = list(model.children())
    return [layer._sparse_weights["weight"].probe.grad for layer in layers]


@pytest.mark.parametrize("none", [True, False])
def test_a_layer_whose_forward_pass_is_thrown_away_has_no_gradient_of_before(none: bool) -> None:
    model, sparsifier = _chain()
    optimizer = SGD(model.parameters(), lr=0.1)
    model(torch.randn(5, 6)).square().mean().backward()
    assert all(gradient is not None and gradient.any() for gradient in _gradients(model))
    optimizer.zero_grad(set_to_none=none)
    first, second = model.children()
    first(torch.randn(5, 6))
    second(torch.randn(5, 8)).square().mean().backward()
    optimizer.step()
    gradients = _gradients(model)
    assert gradients[0] is None
    assert gradients[1] is not None
    sparsifier.refresh()


def test_a_gradient_that_is_zero_on_b_alone_is_kept() -> None:
    layer = nn.Linear(6, 8, bias=False)
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight[:, :2] += 10.0
    sets = tk.compute_masks({"0.weight": layer.weight}, tk.TopKastConfig(0.75, 0.75))
    assert not sets["0.weight"].backward[:, 2:].any()
    tk.sparsify(model, CONFIG, masks=sets)
    x = torch.randn(5, 6)
    x[:, :2] = 0.0
    model(x).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()
    SGD(model.parameters(), lr=0.1).step()
    (gradient,) = _gradients(model)
    assert gradient is not None
    assert gradient[:, 2:].all()


def test_a_refresh_of_weights_that_are_all_frozen_leaves_their_sets() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    sparsifier = tk.sparsify(model, tk.TopKastConfig(0.75, method=tk.rigl(), refresh_every=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = sparsifier.masks()
    for name in before:
        model.get_parameter(name).requires_grad_(False)
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        assert sparsifier.step()
    for name, sets in sparsifier.masks().items():
        assert all(map(torch.equal, sets, before[name]))


def test_gradients_that_are_put_together_by_hand_are_told_of() -> None:
    model, sparsifier = _chain()
    optimizer, parameters = SGD(model.parameters(), lr=0.1), list(model.parameters())
    losses = [(model(torch.randn(5, 6)) - n).square().mean() for n in range(2)]
    kept = []
    for loss in losses:
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        kept.append([p.grad.clone() for p in parameters if p.grad is not None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.refresh()
    for parameter, *gradients in zip(parameters, *kept, strict=True):
        parameter.grad = sum(gradients)
    with pytest.warns(UserWarning, match=r"what the last backward pass has left of \['0.weight', "):
        sparsifier.refresh()


def test_gradients_of_a_step_that_a_scaler_leaves_out_choose_no_sets() -> None:
    model, sparsifier = _chain()
    optimizer, scaler = SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", 2.0**127)
    x, before = 100 * torch.randn(5, 6), sparsifier.masks()
    scaler.scale(model(x).square().sum()).backward()
    scaler.step(optimizer)
    with pytest.raises(ValueError, match=r"the gradient of .* is not finite, as in a step"):
        sparsifier.refresh()
    for name, masks in sparsifier.masks().items():
        assert all(map(torch.equal, masks, before[name]))


def test_a_step_without_the_gradient_that_a_refresh_reads_is_not_counted() -> None:
    model = nn.Linear(8, 8)
    config = tk.TopKastConfig(0.75, method=tk.rigl(), refresh_every=2)
    sparsifier, parameters = tk.sparsify(model, config), list(model.parameters())
    optimizer, refreshed = SGD(parameters, lr=0.1), []
    for by_hand in (True, True, True, False):
        loss = model(torch.randn(4, 8)).square().mean()
        optimizer.zero_grad()
        if by_hand:
            for parameter, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = g
        else:
            loss.backward()
        optimizer.step()
        if by_hand and sparsifier.steps == 1:
            with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad of the par"):
                sparsifier.step()
            assert sparsifier.steps == 1
        else:
            refreshed.append(sparsifier.step())
    assert refreshed == [False, True]
