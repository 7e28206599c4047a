"""Gradient descent as pure functions: sgd, adam, adamw."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from topkast_func.checks import check_number
from topkast_func.types import Params, Tensors

Schedule: TypeAlias = Callable[[Tensor], Tensor | float]
LearningRate: TypeAlias = float | Tensor | Schedule
Rule: TypeAlias = Callable[[Tensor, Tensor, Tensors, Tensor], tuple[Tensor, Tensors]]
"""``rule(grad, theta, slots, t)`` to the descent direction and the new slots, t from 1."""


class OptimizerState(NamedTuple):
    """What an optimiser remembers.

    Attributes:
        step: Updates made so far, int64, 0-d, on the CPU.
        slots: For each kind of slot a tree with one tensor per parameter, of its shape.
    """

    step: Tensor
    slots: dict[str, Tensors]


class Optimizer(NamedTuple):
    """A pair of pure functions, and the schedule between them.

    Attributes:
        init: ``init(params)`` to an `OptimizerState` with zero slots.
        update: ``update(grads, state, params, lr=None)`` to (updates, state); the updates are
            to be added to the parameters. ``lr`` None takes ``learning_rate(state.step)``.
        learning_rate: ``learning_rate(step)`` to the 0-d learning rate of that update.
    """

    init: Callable[[Params], OptimizerState]
    update: Callable[..., tuple[Tensors, OptimizerState]]
    learning_rate: Callable[[Tensor], Tensor]


def check_optimizer(optimizer: object) -> None:
    """Check that an optimiser is a pair of pure functions.

    Args:
        optimizer: What is to be one.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(optimizer, Optimizer):
        kind = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise TypeError(f"optimizer must be what sgd(), adam() or adamw() returns, got {kind}")


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

    def rule(grad: Tensor, theta: Tensor, slots: Tensors, t: Tensor) -> tuple[Tensor, Tensors]:
        grad = grad + weight_decay * theta
        if not slots:
            return grad, {}
        velocity = momentum * slots["momentum"] + grad
        return (grad + momentum * velocity if nesterov else velocity), {"momentum": velocity}

    return _optimizer(lr, ("momentum",) if momentum else (), rule)


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
    direction = _adam_rule(betas, eps)

    def rule(grad: Tensor, theta: Tensor, slots: Tensors, t: Tensor) -> tuple[Tensor, Tensors]:
        return direction(grad + weight_decay * theta, theta, slots, t)

    return _optimizer(lr, ("exp_avg", "exp_avg_sq"), rule)


def adamw(
    lr: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019, algorithm 2).

    θ ← θ − η (m̂ / (√v̂ + ε) + λ_w θ), as `torch.optim.AdamW`; the arguments are those of
    `adam`, weight decay λ_w acting on the weight and not on the gradient.

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
    direction = _adam_rule(betas, eps)

    def rule(grad: Tensor, theta: Tensor, slots: Tensors, t: Tensor) -> tuple[Tensor, Tensors]:
        step, slots = direction(grad, theta, slots, t)
        return step + weight_decay * theta, slots

    return _optimizer(lr, ("exp_avg", "exp_avg_sq"), rule)


def _adam_rule(betas: tuple[float, float], eps: float) -> Rule:
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of fractions in [0, 1), got {betas!r}")
    beta1, beta2 = (check_number(f"betas[{i}]", betas[i], 0.0, 1.0) for i in range(2))
    eps = check_number("eps", eps, 0.0)

    def rule(grad: Tensor, theta: Tensor, slots: Tensors, t: Tensor) -> tuple[Tensor, Tensors]:
        mean = torch.lerp(slots["exp_avg"], grad, 1.0 - beta1)
        square = beta2 * slots["exp_avg_sq"] + (1.0 - beta2) * grad * grad
        mean_correction, square_correction = 1.0 - beta1**t, 1.0 - beta2**t
        denominator = square.sqrt() / square_correction.sqrt() + eps
        return mean / mean_correction / denominator, {"exp_avg": mean, "exp_avg_sq": square}

    return rule


def _optimizer(lr: LearningRate, kinds: tuple[str, ...], rule: Rule) -> Optimizer:
    learning_rate = _schedule(lr)

    def init(params: Params) -> OptimizerState:
        zeros = {k: {n: torch.zeros_like(p.detach()) for n, p in params.items()} for k in kinds}
        return OptimizerState(torch.zeros((), dtype=torch.int64), zeros)

    def update(
        grads: Params, state: OptimizerState, params: Params, lr: Tensor | None = None
    ) -> tuple[Tensors, OptimizerState]:
        rate = learning_rate(state.step) if lr is None else lr
        t = (state.step + 1).double()
        updates: Tensors = {}
        slots: dict[str, Tensors] = {kind: {} for kind in kinds}
        for name, theta in params.items():
            held = {kind: state.slots[kind][name] for kind in kinds}
            direction, held = rule(grads[name], theta, held, t)
            updates[name] = (-rate * direction).to(theta.dtype)
            for kind in kinds:
                slots[kind][name] = held[kind]
        return updates, OptimizerState(state.step + 1, slots)

    return Optimizer(init, update, learning_rate)


def _schedule(lr: LearningRate) -> Callable[[Tensor], Tensor]:
    if callable(lr):
        return lambda step: torch.as_tensor(lr(step), dtype=torch.float64)
    if isinstance(lr, Tensor):
        if lr.ndim != 0:
            raise ValueError(f"lr must be a 0-d tensor, got shape {tuple(lr.shape)}")
        return lambda step: lr
    constant = torch.tensor(check_number("lr", lr, 0.0), dtype=torch.float64)
    return lambda step: constant
