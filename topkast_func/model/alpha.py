"""α, what the forward pass computes with: from θ and masks, or from the values of B."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from topkast_func.kernels.library import Gradient, define
from topkast_func.kernels.pattern import BlockRows, block_of, flat, flat_index
from topkast_func.model.deferred import Deferred
from topkast_func.places import placed
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


def alpha(values: Tensor, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return α with the gradient of the identity on B.

    It is one operator: a layer on the kernels does not read its α, and a graph leaves the call out
    where nobody does.

    Args:
        values: The values, those of A first.
        parts: Where they stand in the flat θ, see `split`: those of A and those of B∖A; or the
            ``parts`` of a `Pattern`.
        shape: Shape of θ.

    Returns:
        α: the values on A, exactly 0 elsewhere.
    """
    result: Tensor = _ALPHA(values, parts, shape)
    return result


def alpha_when_read(values: Tensor, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return `alpha`, put together when it is first read where no graph leaves it out.

    It is for models alone, within a step: memory it has none.
    """
    at_once = (
        values.device.type != "cpu"
        or torch.compiler.is_compiling()
        or get_eval_frame_callback() is not None
        or _len_torch_dispatch_stack() > 0
    )
    result: Tensor = (_ALPHA if at_once else _WHEN_READ)(values, parts, shape)
    return result


class _Alpha(Gradient):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, values, parts, ctx.shape = inputs
        ctx.block = block_of(values)
        ctx.save_for_backward(*parts)
        ctx.save_for_forward(*parts)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, split(g, _places(ctx.saved_tensors, ctx.block, ctx.shape)), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return placed(tangents[1], _places(ctx.saved_tensors, ctx.block, ctx.shape), ctx.shape)


def _compute(values: Tensor, parts: list[Tensor], shape: list[int]) -> Tensor:
    places = parts[0]
    if len(parts) > 2:
        matrix = shape[0], math.prod(shape[1:])
        places = flat(BlockRows(*parts[:2]), block_of(values), matrix)
    dense = values.new_zeros(math.prod(shape))
    dense[places] = values.detach()[: places.shape[0]]
    return dense.view(shape)


def _when_read(values: Tensor, parts: list[Tensor], shape: list[int]) -> Tensor:
    return Deferred.of(shape, values, partial(_compute, values, parts, shape))


def _fake(values: Tensor, parts: list[Tensor], shape: list[int]) -> Tensor:
    return values.new_empty(shape)


def _places(parts: Sequence[Tensor], block: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """Return where the values stand in the flat θ; see `alpha`."""
    return torch.cat([*parts]) if len(parts) == 2 else flat_index(parts, block, shape)


_SCHEMA = "(Tensor values, Tensor[] parts, int[] shape) -> Tensor"
_ALPHA = define(f"alpha{_SCHEMA}", _compute, _fake, _Alpha)
_WHEN_READ = define(f"alpha_when_read{_SCHEMA}", _when_read, _fake, _Alpha)


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
