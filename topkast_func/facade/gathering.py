"""θ on B, gathered once for a forward pass and for the penalty that goes with it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from topkast_func.model.indexed import AnySets, Indexed
from topkast_func.reading import readable
from topkast_func.training.loss import parts_of


class Gathered(NamedTuple):
    """What a forward pass has read of a weight.

    Attributes:
        theta: θ.
        sets: The sets.
        values: θ on B, A first.
    """

    theta: Tensor
    sets: Indexed
    values: Tensor

    def is_of(self, theta: Tensor, sets: AnySets) -> bool:
        """Return whether a weight has these sets, and these values still.

        Fused optimisers and ``.data`` write to a tensor without its version becoming another.
        """
        same = self.theta is theta and self.sets is sets
        return same and torch.equal(self.values, self.sets.split(theta.detach()))


class Gathering:
    """Reads a weight, and the penalty from what the last forward pass has read.

    Both graphs then have a node in common, which keeps nothing that a backward pass frees.
    """

    def __init__(self) -> None:
        self._last: Gathered | None = None

    def values(self, theta: Tensor, sets: Indexed) -> Tensor:
        """Return θ on B, A first, for a forward pass.

        Args:
            theta: The weight.
            sets: Its sets.

        Returns:
            The values, [|B|] or [blocks, r, c].
        """
        if torch.compiler.is_compiling():
            return sets.split(theta)
        self._last = None
        recorded = torch.is_grad_enabled() and theta.requires_grad and theta.is_leaf
        traced = torch._C._get_tracing_state() is not None or peek_interpreter_stack() is not None
        if traced or not (recorded and readable(theta)):
            return sets.split(theta)
        values: Tensor = _Gather.apply(theta, sets)  # type: ignore[no-untyped-call]
        if theta.device.type == "cpu":  # elsewhere to compare would be to wait
            self._last = Gathered(theta, sets, values)
        return values

    def parts(self, theta: Tensor, sets: AnySets) -> tuple[Tensor, Tensor]:
        """Return θ on A and θ on B∖A, zero or absent elsewhere.

        Args:
            theta: The weight.
            sets: Its sets.

        Returns:
            The two; once after a forward pass they are what that has read.
        """
        if torch.compiler.is_compiling():
            return parts_of(theta, sets)
        last, self._last = self._last, None
        if last is None or not last.is_of(theta, sets):
            return parts_of(theta, sets)
        active = last.sets.pattern.active_count
        first, second = torch.split(last.values, [active, len(last.values) - active])
        return first, second


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, sets: Indexed) -> Tensor:
        ctx.sets = sets
        return sets.split(theta)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        places, shape = ctx.sets.places.flatten(), ctx.sets.shape
        return g.new_zeros(shape).view(-1).index_add_(0, places, g.flatten()).view(shape), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        found: Tensor = ctx.sets.split(tangent)
        return found
