"""The gradient of every entry is that of the step, or none."""

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
