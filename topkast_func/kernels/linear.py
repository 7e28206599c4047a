"""A sparse linear layer as a function: right under autograd, torch.func and torch.compile.

The products are plain operators, opaque to tracing, with fake kernels; one
`torch.autograd.Function` around them gives the gradient. It is hidden from Dynamo, which
would drop its backward under a compiled `torch.func.grad`.
"""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake, register_vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from topkast_func.kernels.engines import EngineName, Layer, choose, layout
from topkast_func.kernels.engines import engine as engine_of
from topkast_func.kernels.pattern import Pattern, block_of, flattened, nested


def sparse_linear(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    engine: EngineName = "auto",
) -> Tensor:
    """Return y = x·αᵀ + b, computed with A; the gradient of the values reaches all of B.

    ∂y/∂x sees A only; the gradient of ``values`` is that of the dense product at α, sampled
    on B (Top-KAST, NeurIPS 2020, section 2.2). It cannot be differentiated twice.

    Args:
        x: [..., in_features], of the dtype and device of ``values``, any strides. Under
            autocast it is cast to that dtype, and float32 that is returned to that of autocast.
        values: θ on B, A first: [|B|], or [blocks, r, c].
        pattern: The sets.
        shape: out_features and in_features.
        bias: [out_features], or None.
        engine: Who computes; "auto" for the fastest.

    Returns:
        [..., out_features].

    Raises:
        ImportError: The engine asked for is not installed.
        TypeError: The dtype of ``x`` is another one, its layout is not strided, or the engine
            asked for does not support the dtype or device.
        ValueError: ``x`` has another number of features, or there is no such engine.
    """
    out_features, in_features = shape
    if x.layout != torch.strided:
        raise TypeError(f"inputs of layout {x.layout} are not supported, torch.strided ones are")
    if x.shape[-1:] != (in_features,):
        raise ValueError(
            f"inputs of shape {tuple(x.shape)} do not fit a layer of in_features={in_features}"
        )
    device = values.device.type
    if autocast := torch.is_autocast_enabled(device):
        x = x.to(values.dtype)
    if x.dtype != values.dtype:
        raise TypeError(f"inputs are {x.dtype}, the weight is {values.dtype}")
    batch = math.prod(x.shape[:-1])
    layer = layer_of(values, pattern, shape, batch)
    name = _chosen(engine, *layer)
    pack, unpack = layout(name)
    packed = pack(x.reshape(batch, x.shape[-1]))
    y = unpack(_product(name, out_features, values, packed, *flattened(pattern)), batch)
    y = y.reshape(*x.shape[:-1], out_features)
    y = y if bias is None else y + bias
    cast = autocast and y.dtype == torch.float32
    return y.to(torch.get_autocast_dtype(device)) if cast else y


def layer_of(values: Tensor, pattern: Pattern, shape: tuple[int, int], batch: int) -> Layer:
    """Describe a layer to the choice of an engine; sizes that are symbols are settled.

    Args:
        values: θ on B.
        pattern: The sets.
        shape: [out_features, in_features].
        batch: Rows of activations.

    Returns:
        The description.
    """
    block = block_of(values)
    active = pattern.forward.columns.shape[0] * math.prod(block)
    sizes = (*shape, active, values.numel(), *block, batch)
    rows, columns, forward, backward, height, width, rows_seen = map(operator.index, sizes)
    return Layer(
        rows,
        columns,
        forward,
        backward,
        (height, width),
        rows_seen,
        values.dtype,
        values.device.type,
    )


@torch.compiler.assume_constant_result
def _chosen(name: EngineName, *layer: Any) -> str:
    return choose(name, Layer(*layer)).engine


class _Product(torch.autograd.Function):
    """W_A·x with its gradients, all in the layout of an engine."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, features: int, values: Tensor, x: Tensor, *index: Tensor) -> Tensor:
        return _OPS.forward(name, values, x, index, features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.engine, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, x, *index = ctx.saved_tensors
        g = g.contiguous()
        for_values = for_x = None
        if ctx.needs_input_grad[2]:
            for_values = _Gradient.apply("weight_gradient", ctx.engine, values, g, x, *index)
        if ctx.needs_input_grad[3]:
            for_x = _Gradient.apply("input_gradient", ctx.engine, values, g, x, *index)
        return None, None, for_values, for_x, *[None] * len(index)


class _Gradient(torch.autograd.Function):
    """A gradient of the product, which refuses to be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(which: str, name: str, values: Tensor, g: Tensor, x: Tensor, *index: Tensor) -> Any:
        if which == "weight_gradient":
            return _OPS.weight_gradient(name, g, x, index, values)
        return _OPS.input_gradient(name, values, g, index, x.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(
            "a sparse product cannot be differentiated twice; storage='dense' can be"
        )


@torch.compiler.allow_in_graph
def _product(name: str, features: int, *tensors: Tensor) -> Tensor:
    product: Tensor = _Product.apply(name, features, *tensors)
    return product


_LIBRARY = Library("topkast_func", "DEF")
_OPS = torch.ops.topkast_func


def _define(schema: str, compute: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Define an operator for every device, with its fake kernel and its batching."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    register_fake(f"topkast_func::{name}", fake, lib=_LIBRARY)
    register_vmap(f"topkast_func::{name}", partial(_batched, name), lib=_LIBRARY)


def _batched(name: str, info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    """Fold a batch of activations alone into one call; else run the calls one by one."""
    product = getattr(_OPS, name)
    leaves, tree = tree_flatten(arguments)
    dims = tree_flatten(in_dims, is_leaf=lambda dim: dim is None)[0]
    batched = [i for i, dim in enumerate(dims) if dim is not None]
    if batched == [_ACTIVATIONS] and name != "weight_gradient":
        leaves[_ACTIVATIONS] = leaves[_ACTIVATIONS].movedim(dims[_ACTIVATIONS], 0).flatten(0, 1)
        folded = product(*tree_unflatten(leaves, tree))
        return folded.unflatten(0, (info.batch_size, -1)), 0
    results = []
    for call in range(info.batch_size):
        one = [leaves[i].select(dims[i], call) if i in batched else x for i, x in enumerate(leaves)]
        results.append(product(*tree_unflatten(one, tree)))
    return torch.stack(results), 0


_ACTIVATIONS = 2
"""Place of the activations among the arguments of a product."""


def _forward(name: str, values: Tensor, x: Tensor, index: list[Tensor], features: int) -> Tensor:
    return engine_of(name).forward(values.detach(), x.detach(), nested(index), features)


def _input_gradient(
    name: str, values: Tensor, g: Tensor, index: list[Tensor], features: int
) -> Tensor:
    return engine_of(name).input_gradient(values.detach(), g.detach(), nested(index), features)


def _weight_gradient(
    name: str, g: Tensor, x: Tensor, index: list[Tensor], values: Tensor
) -> Tensor:
    return engine_of(name).weight_gradient(g.detach(), x.detach(), nested(index), values.detach())


def _like_activations(
    name: str, values: Tensor, x: Tensor, index: list[Tensor], features: int
) -> Tensor:
    return x.new_empty(x.shape[0], features, *x.shape[2:])


def _like_values(name: str, g: Tensor, x: Tensor, index: list[Tensor], values: Tensor) -> Tensor:
    return values.new_empty(values.shape)


_PRODUCT = "(str engine, Tensor values, Tensor x, Tensor[] index, int features) -> Tensor"
_define(f"forward{_PRODUCT}", _forward, _like_activations)
_define(f"input_gradient{_PRODUCT}", _input_gradient, _like_activations)
_define(
    "weight_gradient(str engine, Tensor g, Tensor x, Tensor[] index, Tensor values) -> Tensor",
    _weight_gradient,
    _like_values,
)
