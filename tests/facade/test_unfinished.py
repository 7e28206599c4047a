"""Steps of optimisers that end in an error, or are made of others: outside B nothing moves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR

from topkast_func import TopKastConfig, TopKastLinear, sparsify


class _Decayed(SGD):
    """Decays all of θ after, and maybe before, the step of its base, and may then fail."""

    fails = False
    before = 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._decay(self.before)
        super().step(closure)
        self._decay(0.9)
        if self.fails:
            raise ArithmeticError("midway")

    def _decay(self, factor: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(factor)


def _gradient(layer: nn.Module) -> None:
    layer(torch.randn(7, 6)).square().mean().backward()


def _layer() -> tuple[TopKastLinear, torch.Tensor, torch.Tensor]:
    layer = TopKastLinear(6, 5, 0.6, 0.3)
    _gradient(layer)
    return layer, layer.weight.detach().clone(), ~layer.masks.backward


def _moves_within(layer: TopKastLinear, before: torch.Tensor) -> bool:
    return torch.equal(layer.weight != before, layer.masks.backward)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_step_that_calls_that_of_its_base_moves_nothing_outside_b(factor: float) -> None:
    layer, before, _ = _layer()
    SGD(layer.parameters(), lr=0.1)  # of whose class torch then hooks the step too
    optimizer = _Decayed(layer.parameters(), lr=0.1)
    optimizer.before = factor
    for _ in range(2):
        optimizer.step()
        assert _moves_within(layer, before)


def test_a_step_that_ends_in_an_error_moves_nothing_outside_b() -> None:
    layer, before, outside = _layer()
    optimizer = _Decayed(layer.parameters(), lr=0.1, momentum=0.5, weight_decay=0.1)
    optimizer.fails = True
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="midway"):
            optimizer.step()
        assert _moves_within(layer, before)
        assert not optimizer.state[layer.weight]["momentum_buffer"][outside].any()
    optimizer.fails = False
    optimizer.step()
    assert _moves_within(layer, before)


def test_a_closure_that_ends_in_an_error_moves_nothing_outside_b() -> None:
    layer, before, _ = _layer()

    def closure() -> float:
        for parameter in layer.parameters():
            parameter.data.mul_(2.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        AdamW(layer.parameters()).step(closure)
    assert _moves_within(layer, before)


def test_a_step_that_a_scheduler_has_held_before_is_guarded_too() -> None:
    class Failing(_Decayed):
        fails = True

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)

    model = nn.Linear(6, 5)
    optimizer = Failing(model.parameters(), lr=0.1)
    ConstantLR(optimizer)
    sparsifier = sparsify(model, TopKastConfig(0.6, 0.3))
    before, inside = model.weight.detach().clone(), sparsifier.masks()["weight"].backward
    _gradient(model)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert torch.equal(model.weight != before, inside)


@pytest.mark.parametrize(
    "register", [Optimizer.register_step_pre_hook, Optimizer.register_step_post_hook]
)
def test_a_hook_that_fails_leaves_what_is_outside_b(register: Callable[..., Any]) -> None:
    layer, before, outside = _layer()
    optimizer = AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)

    def fail(*_: object) -> None:
        raise ArithmeticError

    handle = register(optimizer, fail)
    for _ in range(3):
        with pytest.raises(ArithmeticError):
            optimizer.step()
        assert torch.equal(layer.weight[outside], before[outside])
    handle.remove()
    optimizer.step()
    assert _moves_within(layer, before)


def test_what_a_hook_after_the_step_moves_is_put_back() -> None:
    layer, before, _ = _layer()
    optimizer = AdamW(layer.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: layer.weight.data.mul_(0.5))
    optimizer.step()
    assert _moves_within(layer, before)
