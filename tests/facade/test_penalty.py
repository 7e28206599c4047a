"""The penalty of a sparsified module can be differentiated, whatever it is."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from topkast_func import TopKastConfig, dense, densify, rigl, sparsify, static

WITHOUT: dict[str, dict[str, Any]] = {
    "none": {"penalty": None},
    "rigl": {"backward_sparsity": 0.6, "method": rigl()},
    "static": {"backward_sparsity": 0.6, "method": static()},
    "dense": {"method": dense()},
    "weight 0": {"penalty_weight": 0.0},
}


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize("options", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_penalty_of_zero_has_a_gradient_of_zeros(options: Any, dtype: torch.dtype) -> None:
    model = _model().to(dtype)
    sparsifier = sparsify(model, TopKastConfig(0.6, **options))
    penalty = sparsifier.penalty()
    assert penalty.shape == ()
    assert float(penalty.detach()) == 0.0
    penalty.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)
    before = [p.detach().clone() for p in model.parameters()]
    assert sparsifier.penalize(SGD([model[0].weight], lr=1.0))  # type: ignore[index]
    assert all(map(torch.equal, before, model.parameters()))


def test_a_penalty_of_a_densified_or_frozen_model_is_zero() -> None:
    model = _model()
    sparsifier = sparsify(model, TopKastConfig(0.6))
    model.requires_grad_(requires_grad=False)
    frozen = sparsifier.penalty()
    assert frozen > 0
    assert not frozen.requires_grad
    densify(model)
    assert not sparsifier.penalty().requires_grad
    model.requires_grad_()
    sparsifier.penalty().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_its_gradient_is_added_where_gradients_are_not_recorded(mode: Any) -> None:
    model = _model()
    sparsifier = sparsify(model, TopKastConfig(0.6, penalty_weight=0.1))
    optimizer = SGD(model.parameters(), lr=1.0)
    sparsifier.penalize(optimizer)
    expected = [p.grad for p in model.parameters()]
    optimizer.zero_grad()
    with mode():
        assert sparsifier.penalize(optimizer)
    assert model[0].weight.grad.any()  # type: ignore[index]
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad is None) is (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]
