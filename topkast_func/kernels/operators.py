"""The products of a layer as operators: those of whatever engine, with their derivatives.

Each is linear in its tensors, so that the derivatives of one are the others, of any order. Values
are differentiated as those of B, whichever of them A is (Top-KAST, NeurIPS 2020, section 2.2).
``index`` and ``lead`` are those of `index_of`; a bias is for engines that have room for one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from topkast_func.kernels.dense import Flat
from topkast_func.kernels.engines import engine as engine_of
from topkast_func.kernels.library import Gradient, define, one_by_one
from topkast_func.kernels.pattern import block_of, flat, nested
from topkast_func.kernels.shifted import index_of, multiplied, transposed_multiplied
from topkast_func.places import placed


class _Product(Gradient):
    """The derivatives of W_A·x, all in the layout of an engine."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.engine, values, x, index, ctx.features, ctx.lead, _ = inputs
        ctx.save_for_backward(values, x, *index)
        ctx.save_for_forward(values, x, *index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, x, *index = ctx.saved_tensors
        g, for_values, for_x = g.contiguous(), None, None
        if ctx.needs_input_grad[2]:
            for_values = weight_gradient(ctx.engine, g, x, index, values, ctx.lead)
        if ctx.needs_input_grad[3]:
            for_x = transposed_product(ctx.engine, values, g, index, x.shape[1], ctx.lead, None)
        for_bias = g.sum(0) if ctx.needs_input_grad[7] else None
        return None, None, for_values, for_x, None, None, None, for_bias

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        values, x, *index = ctx.saved_tensors
        moved = _matrix(tangents[2], index, (ctx.features, x.shape[1]))
        result: Tensor = product(
            ctx.engine, values, tangents[3], index, ctx.features, ctx.lead, tangents[7]
        )
        return result + multiplied(moved, x, index_of(index, ctx.lead))


class _TransposedProduct(_Product):
    """The derivatives of W_Aᵀ·x."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, x, *index = ctx.saved_tensors
        g, for_values, for_x = g.contiguous(), None, None
        if ctx.needs_input_grad[2]:
            for_values = weight_gradient(ctx.engine, x, g, index, values, ctx.lead)
        if ctx.needs_input_grad[3]:
            for_x = product(ctx.engine, values, g, index, x.shape[1], ctx.lead, None)
        for_bias = g.sum(0) if ctx.needs_input_grad[7] else None
        return None, None, for_values, for_x, None, None, None, for_bias

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        values, x, *index = ctx.saved_tensors
        features, lead = ctx.features, ctx.lead
        moved = _matrix(tangents[2], index, (x.shape[1], features))
        result: Tensor = transposed_product(
            ctx.engine, values, tangents[3], index, features, lead, tangents[7]
        )
        return result + transposed_multiplied(moved, x, index_of(index, lead), features)


class _WeightGradient(Gradient):
    """The derivatives of g·xᵀ sampled on B: dense products, as only second ones need them."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.engine, g, x, index, values, ctx.lead = inputs
        ctx.save_for_backward(g, x, values, *index)
        ctx.save_for_forward(g, x, values, *index)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, x, _, *index = ctx.saved_tensors
        w, sets = _matrix(v, index, (g.shape[1], x.shape[1])), index_of(index, ctx.lead)
        for_x = transposed_multiplied(w, g, sets, x.shape[1])
        return None, None, multiplied(w, x, sets), for_x, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        g, x, values, *index = ctx.saved_tensors
        of_g: Tensor = weight_gradient(ctx.engine, tangents[2], x, index, values, ctx.lead)
        of_x: Tensor = weight_gradient(ctx.engine, g, tangents[3], index, values, ctx.lead)
        return of_g + of_x


def _matrix(values: Tensor, index: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """Return the dense matrix of values, those of B∖A too; of a kernel, a column for each tap."""
    if isinstance(sets := index_of(index, 0), Flat):
        exploring = flat(sets.exploring, block_of(values), shape)
        return placed(values, torch.cat((sets.active, exploring)), shape)
    rows, columns = shape[0], index[7].numel() if index[7:] else shape[1]
    places = nested(index[:7]).flat_index(block_of(values), (rows, columns))
    return placed(values, places, (rows, columns))


def _compute_product(name: str, *given: Any) -> Tensor:
    return _computed(engine_of(name).forward, *given)


def _compute_transposed_product(name: str, *given: Any) -> Tensor:
    return _computed(engine_of(name).input_gradient, *given)


def _computed(
    compute: Callable[..., Tensor],
    values: Tensor,
    x: Tensor,
    index: list[Tensor],
    features: int,
    lead: int,
    bias: Tensor | None,
) -> Tensor:
    added = () if bias is None else (bias.detach(),)
    return compute(values.detach(), x.detach(), index_of(index, lead), features, *added)


def _compute_weight_gradient(
    name: str, g: Tensor, x: Tensor, index: list[Tensor], values: Tensor, lead: int
) -> Tensor:
    sets = index_of(index, lead)
    return engine_of(name).weight_gradient(g.detach(), x.detach(), sets, values.detach())


def _like_activations(
    name: str, values: Tensor, x: Tensor, index: list[Tensor], features: int, *_: Any
) -> Tensor:
    return x.new_empty(x.shape[0], features, *x.shape[2:])


def _like_values(
    name: str, g: Tensor, x: Tensor, index: list[Tensor], values: Tensor, lead: int
) -> Tensor:
    return values.new_empty(values.shape)


def _folded(operator: Any, info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    """Batch a product in one call, where the activations alone are batched."""
    name, values, x, *others = arguments
    if any(dim is not None for dim in (in_dims[1], *in_dims[3], in_dims[6])):
        return one_by_one(operator, info, in_dims, *arguments)
    x = x.movedim(in_dims[2], 0).flatten(0, 1)
    y = operator(name, values, x, *others)
    return y.unflatten(0, (info.batch_size, -1)), 0


_PRODUCT = (
    "(str engine, Tensor values, Tensor x, Tensor[] index, int features, int lead, Tensor? bias)"
    " -> Tensor"
)

product = define(f"forward{_PRODUCT}", _compute_product, _like_activations, _Product, _folded)
"""``product(engine, values, x, index, out_features, lead, bias)``: W_A·x + b."""

transposed_product = define(
    f"transposed_forward{_PRODUCT}",
    _compute_transposed_product,
    _like_activations,
    _TransposedProduct,
    _folded,
)
"""``transposed_product(engine, values, x, index, out_features, lead, bias)``: W_Aᵀ·x + b."""

weight_gradient = define(
    "weight_gradient(str engine, Tensor g, Tensor x, Tensor[] index, Tensor values, int lead) "
    "-> Tensor",
    _compute_weight_gradient,
    _like_values,
    _WeightGradient,
)
"""``weight_gradient(engine, g, x, index, values, lead)``: g·xᵀ sampled on B, as ``values``."""
