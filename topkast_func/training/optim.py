"""Gradient descent as pure functions: sgd, adam, adamw, lion."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from topkast_func.checks import check_number
from topkast_func.training.learning_rates import LearningRate, RateOf
from topkast_func.training.transformation import Given, Optimizer, OptimizerState, starting, wide
from topkast_func.types import Params, Tensors


@dataclass(frozen=True)
class Rule(ABC):
    """How one parameter is moved."""

    @property
    def kind(self) -> str:
        """Name of the optimiser."""
        return type(self).__name__.lower()

    @property
    @abstractmethod
    def slots(self) -> tuple[str, ...]:
        """Names of what is remembered, of the shape of the parameter, zero at the start."""

    @abstractmethod
    def __call__(
        self, grad: Tensor, theta: Tensor, slots: Tensors, t: Tensor
    ) -> tuple[Tensor, Tensors]:
        """Return the descent direction and the new slots; t is counted from 1."""


@dataclass(frozen=True)
class SGD(Rule):
    """The rule of `sgd`."""

    momentum: float
    nesterov: bool
    weight_decay: float

    @property
    def slots(self) -> tuple[str, ...]:
        """The velocity, where there is momentum."""
        return ("momentum",) if self.momentum else ()

    def __call__(
        self, grad: Tensor, theta: Tensor, slots: Tensors, t: Tensor
    ) -> tuple[Tensor, Tensors]:
        """See `sgd`."""
        grad = grad + self.weight_decay * theta
        if not slots:
            return grad, {}
        velocity = self.momentum * slots["momentum"] + grad
        ahead = grad + self.momentum * velocity if self.nesterov else velocity
        return ahead, {"momentum": velocity}


@dataclass(frozen=True)
class Adam(Rule):
    """The rule of `adam`."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @property
    def slots(self) -> tuple[str, ...]:
        """The first and the second moment."""
        return "exp_avg", "exp_avg_sq"

    def __call__(
        self, grad: Tensor, theta: Tensor, slots: Tensors, t: Tensor
    ) -> tuple[Tensor, Tensors]:
        """See `adam`."""
        return self.corrected(grad + self.weight_decay * theta, slots, t)

    def corrected(self, grad: Tensor, slots: Tensors, t: Tensor) -> tuple[Tensor, Tensors]:
        """Return m̂ / (√v̂ + ε) and the new moments."""
        beta1, beta2 = self.betas
        mean = torch.lerp(slots["exp_avg"], grad, 1.0 - beta1)
        square = beta2 * slots["exp_avg_sq"] + (1.0 - beta2) * grad * grad
        mean_correction, square_correction = 1.0 - beta1**t, 1.0 - beta2**t
        denominator = square.sqrt() / square_correction.sqrt() + self.eps
        return mean / mean_correction / denominator, {"exp_avg": mean, "exp_avg_sq": square}


@dataclass(frozen=True)
class AdamW(Adam):
    """The rule of `adamw`."""

    def __call__(
        self, grad: Tensor, theta: Tensor, slots: Tensors, t: Tensor
    ) -> tuple[Tensor, Tensors]:
        """See `adamw`."""
        step, slots = self.corrected(grad, slots, t)
        return step + self.weight_decay * theta, slots


@dataclass(frozen=True)
class Lion(Rule):
    """The rule of `lion`."""

    betas: tuple[float, float]
    weight_decay: float

    @property
    def slots(self) -> tuple[str, ...]:
        """The first moment."""
        return ("exp_avg",)

    def __call__(
        self, grad: Tensor, theta: Tensor, slots: Tensors, t: Tensor
    ) -> tuple[Tensor, Tensors]:
        """See `lion`."""
        beta1, beta2 = self.betas
        mean = slots["exp_avg"]
        step = torch.lerp(mean, grad, 1.0 - beta1).sign()
        return step + self.weight_decay * theta, {"exp_avg": torch.lerp(mean, grad, 1.0 - beta2)}


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
    real = {name: _real(theta.detach()) for name, theta in params.items()}
    return starting({
        f"{rule.kind}.{slot}": {name: torch.zeros_like(theta) for name, theta in real.items()}
        for slot in rule.slots
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
    t = (state.step + 1).double()
    updates: Tensors = {}
    slots: dict[str, Tensors] = {f"{rule.kind}.{slot}": {} for slot in rule.slots}
    for name, theta in params.items():
        held = {slot: state.slots[f"{rule.kind}.{slot}"][name] for slot in rule.slots}
        direction, held = rule(_real(grads[name]), _real(theta), held, t)
        update = -lr * direction
        updates[name] = (torch.view_as_complex(update) if theta.is_complex() else update).to(
            theta.dtype
        )
        for slot in rule.slots:
            slots[f"{rule.kind}.{slot}"][name] = held[slot]
    return updates, OptimizerState(state.step + 1, slots)


def _real(tensor: Tensor) -> Tensor:
    """Return a tensor as it is computed with: wide, a complex number as two real ones."""
    return torch.view_as_real(wide(tensor)) if tensor.is_complex() else wide(tensor)
