"""α of a weight whose sets are packed in bits, with a gradient that reaches B."""

from typing import Any

import torch
from torch import Tensor

from topkast_func.bits import unpacked
from topkast_func.model.alpha import straight_through
from topkast_func.types import Masks

SETS = "_sets"
"""What the name of the bits has after that of their weight."""


def alpha(theta: Tensor, sets: Tensor) -> Tensor:
    """Return α = θ·1_A, whose gradient is kept on B (Top-KAST, NeurIPS 2020, section 2.2).

    Args:
        theta: The weight, n entries.
        sets: 1_A and 1_B in bits, uint8, [2, ⌈n/8⌉].

    Returns:
        α: exactly θ on A and exactly 0 elsewhere.
    """
    if torch.compiler.is_dynamo_compiling():  # which would lose the gradient of a Function
        return straight_through(theta, masks_in(sets, theta.shape))
    found: Tensor = _Alpha.apply(theta, sets)  # type: ignore[no-untyped-call]
    return found


def masks_in(sets: Tensor, shape: torch.Size) -> Masks:
    """Return the masks that bits hold."""
    return Masks(unpacked(sets[0], shape), unpacked(sets[1], shape))


class _Alpha(torch.autograd.Function):
    """Passes over θ a third as often as `straight_through`, and saves the bits of B alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, sets: Tensor) -> Tensor:
        return torch.where(unpacked(sets[0], theta.shape), theta, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        bits = inputs[1][1].clone()  # the buffer may be written to before the gradient is taken
        ctx.save_for_backward(bits)
        ctx.save_for_forward(bits)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (bits,) = ctx.saved_tensors
        g = g if g.layout == torch.strided else g.to_dense()  # of an embedding with sparse=True
        return torch.where(unpacked(bits, g.shape), g, 0.0), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (bits,) = ctx.saved_tensors
        return torch.where(unpacked(bits, tangent.shape), tangent, 0.0)
