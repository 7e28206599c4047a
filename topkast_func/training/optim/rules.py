"""How one parameter is moved: the rules of the optimisers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from topkast_func.types import Tensors

Numbers: TypeAlias = tuple[Tensor, ...]
"""What a rule computes once for all parameters, 0-d."""


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

    def at(self, t: Tensor) -> Numbers:
        """Return what is the same for all parameters at a step, which is counted from 1."""
        return ()

    @abstractmethod
    def __call__(
        self, grad: Tensor, theta: Tensor, slots: Tensors, at: Numbers
    ) -> tuple[Tensor, Tensors]:
        """Return the descent direction and the new slots."""


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
        self, grad: Tensor, theta: Tensor, slots: Tensors, at: Numbers
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
        self, grad: Tensor, theta: Tensor, slots: Tensors, at: Numbers
    ) -> tuple[Tensor, Tensors]:
        """See `adam`."""
        return self.corrected(grad + self.weight_decay * theta, slots, at)

    def at(self, t: Tensor) -> Numbers:
        """Return m / m̂ and √(v / v̂)."""
        beta1, beta2 = self.betas
        return 1.0 - beta1**t, (1.0 - beta2**t).sqrt()

    def corrected(self, grad: Tensor, slots: Tensors, at: Numbers) -> tuple[Tensor, Tensors]:
        """Return m̂ / (√v̂ + ε) and the new moments."""
        beta1, beta2 = self.betas
        mean = torch.lerp(slots["exp_avg"], grad, 1.0 - beta1)
        square = torch.addcmul(beta2 * slots["exp_avg_sq"], grad, grad, value=1.0 - beta2)
        mean_correction, root_correction = at
        denominator = square.sqrt() / root_correction + self.eps
        return mean / mean_correction / denominator, {"exp_avg": mean, "exp_avg_sq": square}


@dataclass(frozen=True)
class AdamW(Adam):
    """The rule of `adamw`."""

    def __call__(
        self, grad: Tensor, theta: Tensor, slots: Tensors, at: Numbers
    ) -> tuple[Tensor, Tensors]:
        """See `adamw`."""
        step, slots = self.corrected(grad, slots, at)
        return torch.add(step, theta, alpha=self.weight_decay), slots


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
        self, grad: Tensor, theta: Tensor, slots: Tensors, at: Numbers
    ) -> tuple[Tensor, Tensors]:
        """See `lion`."""
        beta1, beta2 = self.betas
        mean = slots["exp_avg"]
        step = torch.lerp(mean, grad, 1.0 - beta1).sign()
        return step + self.weight_decay * theta, {"exp_avg": torch.lerp(mean, grad, 1.0 - beta2)}
