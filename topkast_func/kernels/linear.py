"""A sparse linear layer as a function: right under autograd, torch.func and torch.compile."""

import math
import operator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from topkast_func.checks import check_type
from topkast_func.kernels.costs import Layer
from topkast_func.kernels.dense import flat_sets, on_device
from topkast_func.kernels.engines import EngineName, choose, layout
from topkast_func.kernels.operators import product, transposed_product
from topkast_func.kernels.pattern import Pattern, block_of, flattened
from topkast_func.kernels.tiles import at_once, spelled_out

LITTLE = 2**14
"""Numbers below which torch transposes activations sooner than an operator of one's own begins."""


def sparse_linear(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    engine: EngineName = "auto",
    transposed: bool = False,
) -> Tensor:
    """Return y = x·αᵀ + b, or x·α + b, computed with A; the gradient of values reaches all of B.

    ∂y/∂x sees A only; the gradient of ``values`` is that of the dense product at α, sampled
    on B (Top-KAST, NeurIPS 2020, section 2.2). Forward mode and derivatives of any order follow the
    same rule; there the products with what moves in B are dense.

    Args:
        x: [..., in_features], of the dtype and device of ``values``, any strides. Under autocast
            all is cast to its dtype, but for float64, which is kept, and float16 on a CPU: products
            are in the dtype of the values there, and float32 that is returned is cast.
        values: θ on B, A first: [|B|], or [blocks, r, c].
        pattern: The sets.
        shape: Of α: out_features and in_features.
        bias: [out_features], or None.
        engine: Who computes; "auto" for the fastest.
        transposed: Whether α is [in_features, out_features], and not to be transposed.

    Returns:
        [..., out_features].

    Raises:
        ImportError: The engine asked for is not installed.
        TypeError: ``x`` is no tensor, its dtype is another one, its layout is not strided, or the
            engine asked for does not support the dtype or device.
        ValueError: ``x`` has another number of features, or there is no such engine.
    """
    out_features, in_features = shape[::-1] if transposed else shape
    check_inputs(x, in_features)
    device = values.device.type
    if autocast := torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
        if values.dtype != torch.float64 and (device != "cpu" or kind == torch.bfloat16):
            values = values.to(kind)
            bias = None if bias is None else bias.to(values.dtype)
        x = x.to(values.dtype)
    if x.dtype != values.dtype:
        raise TypeError(f"inputs are {x.dtype}, the weight is {values.dtype}")
    batch, flat = math.prod(x.shape[:-1]), x.ndim == 2
    name = chosen(engine, values, pattern, shape, batch)
    pack, unpack = layout(name)
    fused = torch.compiler.is_compiling() and flat
    turn = spelled_out if fused or x.numel() < LITTLE else at_once
    packed = pack(x if flat else x.reshape(batch, x.shape[-1]), turn)
    multiply = transposed_product if transposed else product
    added, bias = (bias, None) if _takes(name, values, bias) else (None, bias)
    index = flattened(pattern)
    if name == "dense" and on_device(values):
        active, exploring = flat_sets(values, pattern, shape)
        index = (active, *exploring)
    y = multiply(name, values, packed, index, out_features, 0, added)
    y = unpack(y, batch, turn)
    y = y if flat else y.reshape(*x.shape[:-1], out_features)
    y = y if bias is None else y + bias
    return y.to(kind) if autocast and y.dtype == torch.float32 else y


def check_inputs(x: Tensor, in_features: int) -> None:
    """Check that a linear layer can compute with its inputs.

    Args:
        x: The inputs.
        in_features: Of the layer.

    Raises:
        TypeError: See `check_strided_inputs`.
        ValueError: They have another number of features.
    """
    check_strided_inputs(x)
    if x.shape[-1:] != (in_features,):
        raise ValueError(
            f"inputs of shape {tuple(x.shape)} do not fit a layer of in_features={in_features}"
        )


def check_strided_inputs(x: Tensor) -> None:
    """Check that the inputs of a layer are a strided tensor.

    Args:
        x: The inputs.

    Raises:
        TypeError: They are no tensor, or one that is nested or otherwise not strided.
    """
    check_type("inputs", x, Tensor)
    if x.is_nested or x.layout != torch.strided:
        layout = "nested tensors" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"inputs of {layout} are not supported, torch.strided ones are")


def _takes(name: str, values: Tensor, bias: Tensor | None) -> bool:
    """Return whether an engine adds a bias to its sums, before they are rounded."""
    return name == "triton" and bias is not None and bias.dtype == values.dtype


def described(
    values: Tensor, pattern: Pattern, shape: tuple[int, int], batch: int, rows: int = 0
) -> tuple[Any, ...]:
    """Describe a layer to the choice of an engine; sizes that are symbols are settled.

    Args:
        values: θ on B.
        pattern: The sets.
        shape: Of α.
        batch: Rows of activations.
        rows: See `Layer`.

    Returns:
        What a `Layer` is made of, in its order.
    """
    block, device = block_of(values), values.device
    sizes = (*shape, pattern.active_count * math.prod(block), values.numel(), *block, batch)
    height, width, forward, backward, tall, wide, seen = map(operator.index, sizes)
    kind = values.dtype, device.type, rows, device.index
    return height, width, forward, backward, (tall, wide), seen, *kind


def chosen(
    name: EngineName,
    values: Tensor,
    pattern: Pattern,
    shape: tuple[int, int],
    batch: int,
    rows: int = 0,
) -> str:
    """Choose an engine; while Dynamo traces, by a function that it takes for a constant."""
    layer = described(values, pattern, shape, batch, rows)
    if torch.compiler.is_dynamo_compiling():
        from topkast_func.kernels.tracing import constant  # its import loads Dynamo: a second

        return constant(name, *layer)
    return _choice(name, Layer(*layer)).engine


_choice = lru_cache(choose)
