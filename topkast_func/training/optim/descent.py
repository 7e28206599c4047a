"""Gradient descent as pure functions: sgd, adam, adamw, lion."""

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from topkast_func.checks import check_number
from topkast_func.training.optim.rates import LearningRate, RateOf
from topkast_func.training.optim.rules import SGD, Adam, AdamW, Lion, Rule
from topkast_func.training.optim.transformation import (
    Given,
    Optimizer,
    OptimizerState,
    cast,
    starting,
    wide,
)
from topkast_func.types import Params, Tensors


def sgd(
    lr: LearningRate, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    """Stochastic gradient descent: v ← μ v + g, θ ← θ − η v, as `torch.optim.SGD`.

    Args:
        lr: Learning rate η ≥ 0: a float, a 0-d tensor (read anew at each step), or a schedule
            called with the 0-d number of the step, from 0.
        momentum: μ, fraction in [0, 1).
        nesterov: Step along g + μ v.
        weight_decay: Added to the gradient times θ, at least 0.

    Returns:
        The optimiser.

    Raises:
        TypeError: A number is not a number.
        ValueError: A number is out of range, or ``nesterov`` comes without momentum.
    """
    momentum = check_number("momentum", momentum, 0.0, 1.0)
    weight_decay = check_number("weight_decay", weight_decay, 0.0)
    if nesterov and momentum == 0.0:
        raise ValueError("nesterov needs momentum above 0, got 0.0")
    return _optimizer(lr, SGD(momentum, bool(nesterov), weight_decay))


def adam(
    lr: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Adam (Kingma and Ba, 2015, algorithm 1), with weight decay as an L2 gradient.

    θ ← θ − η m̂ / (√v̂ + ε), as `torch.optim.Adam`.

    Args:
        lr: Learning rate η ≥ 0: a float, a 0-d tensor (read anew at each step), or a schedule
            called with the 0-d number of the step, from 0.
        betas: Decay of the first and second moment, fractions in [0, 1).
        eps: ε, at least 0.
        weight_decay: Added to the gradient times θ, at least 0.

    Returns:
        The optimiser.

    Raises:
        TypeError: A number is not a number.
        ValueError: A number is out of range.
    """
    weight_decay = check_number("weight_decay", weight_decay, 0.0)
    return _optimizer(lr, Adam(_betas(betas), check_number("eps", eps, 0.0), weight_decay))


def adamw(
    lr: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019, algorithm 2).

    θ ← θ − η (m̂ / (√v̂ + ε) + λ_w θ), as `torch.optim.AdamW`; the arguments are those of
    `adam`, weight decay λ_w acting on the weight and not on the gradient.

    The gradient of a layer that a batch does not use is zero, so that moments and decay go on
    moving it, here and in every optimiser of this library; `torch.optim` passes over a layer whose
    ``grad`` is None.

    Args:
        lr: Learning rate η, see `adam`.
        betas: Decay of the first and second moment, fractions in [0, 1).
        eps: ε, at least 0.
        weight_decay: λ_w, at least 0.

    Returns:
        The optimiser.

    Raises:
        TypeError: A number is not a number.
        ValueError: A number is out of range.
    """
    weight_decay = check_number("weight_decay", weight_decay, 0.0)
    return _optimizer(lr, AdamW(_betas(betas), check_number("eps", eps, 0.0), weight_decay))


def lion(
    lr: LearningRate = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
) -> Optimizer:
    """Lion (Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2).

    θ ← θ − η (sign(β₁ m + (1 − β₁) g) + λ_w θ), then m ← β₂ m + (1 − β₂) g. Every entry of B
    moves by η at each step, so that η is to be 3 to 10 times smaller than for `adamw`, and
    λ_w as many times larger (section 5 there).

    Args:
        lr: Learning rate η, see `adam`.
        betas: β₁ of the direction and β₂ of what is remembered, fractions in [0, 1).
        weight_decay: λ_w, at least 0, decoupled as in `adamw`.

    Returns:
        The optimiser.

    Raises:
        TypeError: A number is not a number.
        ValueError: A number is out of range.
    """
    weight_decay = check_number("weight_decay", weight_decay, 0.0)
    return _optimizer(lr, Lion(_betas(betas), weight_decay))


def _betas(betas: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of fractions in [0, 1), got {betas!r}")
    first, second = (check_number(f"betas[{i}]", betas[i], 0.0, 1.0) for i in range(2))
    return first, second


def _optimizer(lr: LearningRate, rule: Rule) -> Optimizer:
    rate = RateOf(lr)
    numbers = "".join(f", {f.name}={getattr(rule, f.name)!r}" for f in fields(rule))
    return Optimizer(
        Given(_start, rule),
        Given(_descend, (rule, rate)),
        rate,
        elementwise=True,
        name=f"{rule.kind}(lr={rate}{numbers})",
    )


def _start(rule: Rule, params: Params) -> OptimizerState:
    return starting({
        kind: {n: torch.zeros_like(_real(p.detach())) for n, p in params.items()}
        for kind in _kinds(rule).values()
    })


def _descend(
    given: tuple[Rule, RateOf],
    grads: Params,
    state: OptimizerState,
    params: Params,
    lr: Tensor | None = None,
) -> tuple[Tensors, OptimizerState]:
    rule, rate = given
    lr = rate(state.step) if lr is None else lr
    at, descent = rule.at((state.step + 1).double()), -lr
    updates: Tensors = {}
    before = {slot: state.slots[kind] for slot, kind in _kinds(rule).items()}
    after: dict[str, Tensors] = {slot: {} for slot in before}
    for name, theta in params.items():
        held = {slot: tree[name] for slot, tree in before.items()}
        direction, held = rule(_real(grads[name]), _real(theta), held, at)
        update = descent * direction
        update = torch.view_as_complex(update) if theta.is_complex() else update
        updates[name] = cast(update, theta.dtype)
        for slot, tree in after.items():
            tree[name] = held[slot]
    slots = {kind: after[slot] for slot, kind in _kinds(rule).items()}
    return updates, OptimizerState(state.step + 1, slots)


def _kinds(rule: Rule) -> dict[str, str]:
    """Return how the slots of a rule are called in a state."""
    return {slot: f"{rule.kind}.{slot}" for slot in rule.slots}


def _real(tensor: Tensor) -> Tensor:
    """Return a tensor as it is computed with: wide, a complex number as two real ones."""
    return torch.view_as_real(wide(tensor)) if tensor.is_complex() else wide(tensor)
