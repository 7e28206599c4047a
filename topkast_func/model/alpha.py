"""α, what the forward pass computes with: from θ and masks, or from the values of B."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

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
    stored = index < theta.numel()
    merged.view(-1)[index[stored].to(theta.device)] = values[stored].to(theta.device)
    return merged


def alpha(values: Tensor, index: Tensor, active_count: int, shape: torch.Size) -> Tensor:
    """Return α with the gradient of the identity on B.

    Args:
        values: The values, those of A first.
        index: Where they stand in the flat θ; see `split`.
        active_count: How many of them, or blocks of them, are those of A.
        shape: Shape of θ.

    Returns:
        α: the values on A, exactly 0 elsewhere.
    """
    exploring = values[active_count:]
    seen = torch.cat((values[:active_count], exploring - exploring.detach()))
    with_spare = values.new_zeros(math.prod(shape) + 1)
    return with_spare.index_put((index,), seen)[:-1].view(shape)


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
