"""Learning rates: a number, a tensor, or a schedule, checked at each step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from topkast_func.checks import check_number

Schedule: TypeAlias = Callable[[Tensor], Tensor | float]
LearningRate: TypeAlias = float | Tensor | Schedule

Rate: TypeAlias = Tensor | Mapping[str, "Rate"]
"""The 0-d learning rate of one update, or one by group of parameters."""


@dataclass(frozen=True, eq=False)
class RateOf:
    """The learning rate of each update: ``rate(step)`` to a 0-d tensor, checked.

    Two are equal where they are of the same number, tensor or schedule.

    Attributes:
        given: A float, a 0-d tensor, which is read anew at each step, or a schedule.
    """

    given: LearningRate

    def __post_init__(self) -> None:
        """Check what can be checked before the first step."""
        if not callable(self.given):
            checked(self.given, "lr")

    def __call__(self, step: Tensor) -> Tensor:
        """Return the learning rate of a step.

        Args:
            step: Number of the step, int64, 0-d, from 0.

        Returns:
            The rate, 0-d: float64, or the tensor that was given. One on a device other than the
            CPU is checked but for its value, which would have to be waited for.

        Raises:
            TypeError: It is no number.
            ValueError: It is not 0-d, not finite, or below 0.
        """
        if not callable(self.given) and not isinstance(self.given, Tensor):
            return checked(self.given, "lr")
        name = "lr" if torch.compiler.is_compiling() else f"lr at step {int(step)}"
        if isinstance(self.given, Tensor):
            return checked(self.given, name)
        return checked(self.given(step), name).to(torch.float64)

    def __eq__(self, other: object) -> bool:
        """Compare what is given; tensors, which may change, as objects."""
        if not isinstance(other, RateOf) or isinstance(self.given, Tensor):
            return isinstance(other, RateOf) and self.given is other.given
        return not isinstance(other.given, Tensor) and self.given == other.given

    def __hash__(self) -> int:
        """Hash what is given."""
        return hash(self.given)

    def __repr__(self) -> str:
        """Print what is given; a function by its name."""
        return getattr(self.given, "__name__", repr(self.given))


def checked(rate: Any, name: str = "lr") -> Tensor:
    """Return a learning rate as a tensor.

    Args:
        rate: A number or a 0-d tensor.
        name: What it is called in the error.

    Returns:
        The rate, 0-d.

    Raises:
        TypeError: It is no real number.
        ValueError: It is not 0-d, not finite, or below 0.
    """
    if not isinstance(rate, Tensor):
        return torch.tensor(check_number(name, rate, 0.0), dtype=torch.float64, device="cpu")
    if rate.ndim != 0:
        raise ValueError(f"{name} must be a 0-d tensor, got shape {tuple(rate.shape)}")
    if rate.dtype == torch.bool or rate.is_complex():
        raise TypeError(f"{name} must be a real number, got a tensor of {rate.dtype}")
    if rate.device.type == "cpu" and not torch.compiler.is_compiling():
        check_number(name, rate.item(), 0.0)
    return rate
