"""α, what the forward pass computes with: from θ and masks, or from the values of B."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from topkast_func.kernels.library import Gradient, define
from topkast_func.kernels.pattern import placed
from topkast_func.types import Masks, Params, Tensors


def split(theta: Tensor, index: Tensor) -> Tensor:
    """Gather the values of B from θ.

    Args:
        theta: The weight.
        index: Where the values stand in the flat θ, int64; the number of entries of θ where a
            place is unused.

    Returns:
        The values, in the shape of ``index``; zero where a place is unused.
    """
    stored = index < theta.numel()
    return torch.where(stored, theta.flatten()[index * stored], 0.0)


def merge(values: Tensor, theta: Tensor, index: Tensor) -> Tensor:
    """Scatter the values of B into a copy of θ; inverse of `split` on B.

    Args:
        values: The values.
        theta: The weight; only its entries outside B are read.
        index: Where the values stand in the flat θ; see `split`.

    Returns:
        θ, up to date on B, in the shape and on the device of ``theta``.
    """
    merged = theta.clone(memory_format=torch.contiguous_format)
    index, values = (tensor.flatten().to(theta.device) for tensor in (index, values))
    stored = index < theta.numel()  # where not, write the first value, which is of A, once more
    index, values = (torch.where(stored, tensor, tensor[0]) for tensor in (index, values))
    merged.view(-1)[index] = values
    return merged


def alpha(values: Tensor, index: Tensor, active_count: int, shape: Sequence[int]) -> Tensor:
    """Return α with the gradient of the identity on B.

    It is one operator: a layer on the kernels does not read its α, and one call is easily left out.

    Args:
        values: The values, those of A first.
        index: Where they stand in the flat θ; see `split`.
        active_count: How many of them, or blocks of them, are those of A.
        shape: Shape of θ.

    Returns:
        α: the values on A, exactly 0 elsewhere.
    """
    result: Tensor = _ALPHA(values, index, active_count, shape)
    return result


class _Alpha(Gradient):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shape = inputs[4]
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, split(g, *ctx.saved_tensors), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (index,) = ctx.saved_tensors
        return placed(tangents[1], index, ctx.shape)


def _compute(values: Tensor, index: Tensor, active_count: int, shape: list[int]) -> Tensor:
    dense = values.new_zeros(math.prod(shape))
    dense[index[:active_count]] = values.detach()[:active_count]
    return dense.view(shape)


def _fake(values: Tensor, index: Tensor, active_count: int, shape: list[int]) -> Tensor:
    return values.new_empty(shape)


_ALPHA = define(
    "alpha(Tensor values, Tensor index, int active_count, int[] shape) -> Tensor",
    _compute,
    _fake,
    _Alpha,
)


def straight_through(theta: Tensor, masks: Masks) -> Tensor:
    """Return α = θ·1_A with the gradient of the identity on B.

    Args:
        theta: The weight.
        masks: Its sets.

    Returns:
        α = θ·1_A + (θ − stop(θ))·1_{B∖A}: exactly θ on A and exactly 0 elsewhere.
    """
    ghost = torch.where(masks.backward, theta - theta.detach(), 0.0)
    return torch.where(masks.forward, theta, ghost)


def straight_through_all(params: Params, masks: Mapping[str, Masks]) -> Tensors:
    """Return α of every parameter, dense ones as they are.

    Args:
        params: θ by name.
        masks: Sets by name.

    Returns:
        α by name, in the order of ``params``.
    """
    return {
        name: straight_through(theta, masks[name]) if name in masks else theta
        for name, theta in params.items()
    }
