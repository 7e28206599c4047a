"""The products of a layer as operators: those of whatever engine, with their gradients."""

from typing import Any

from torch import Tensor

from topkast_func.kernels.engines import engine as engine_of
from topkast_func.kernels.library import Gradient, define, one_by_one
from topkast_func.kernels.pattern import nested


class _Product(Gradient):
    """The gradients of W_A·x, all in the layout of an engine."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.engine, values, x, index, _ = inputs
        ctx.save_for_backward(values, x, *index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, g.contiguous(), transposed=False)


class _TransposedProduct(_Product):
    """The gradients of W_Aᵀ·x."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, g.contiguous(), transposed=True)


def _gradients(ctx: Any, g: Tensor, transposed: bool) -> tuple[Tensor | None, ...]:
    values, x, *index = ctx.saved_tensors
    back = transposed_input_gradient if transposed else input_gradient
    rows, columns = (x, g) if transposed else (g, x)
    for_values = for_x = None
    if ctx.needs_input_grad[2]:
        for_values = weight_gradient(ctx.engine, rows, columns, index, values)
    if ctx.needs_input_grad[3]:
        for_x = back(ctx.engine, values, g, index, x.shape[1])
    return None, None, for_values, for_x, None, None


class _Once(Gradient):
    """A gradient of the product refuses to be differentiated again."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(
            "a sparse product cannot be differentiated twice; with storage='dense' it can be, and "
            "in a facade with engine='dense'"
        )


def _compute_product(
    name: str, values: Tensor, x: Tensor, index: list[Tensor], features: int
) -> Tensor:
    return engine_of(name).forward(values.detach(), x.detach(), nested(index), features)


def _compute_input_gradient(
    name: str, values: Tensor, g: Tensor, index: list[Tensor], features: int
) -> Tensor:
    return engine_of(name).input_gradient(values.detach(), g.detach(), nested(index), features)


def _compute_weight_gradient(
    name: str, g: Tensor, x: Tensor, index: list[Tensor], values: Tensor
) -> Tensor:
    return engine_of(name).weight_gradient(g.detach(), x.detach(), nested(index), values.detach())


def _like_activations(
    name: str, values: Tensor, x: Tensor, index: list[Tensor], features: int
) -> Tensor:
    return x.new_empty(x.shape[0], features, *x.shape[2:])


def _like_values(name: str, g: Tensor, x: Tensor, index: list[Tensor], values: Tensor) -> Tensor:
    return values.new_empty(values.shape)


def _folded(operator: Any, info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    """Batch a product in one call, where the activations alone are batched."""
    name, values, x, index, features = arguments
    if in_dims[1] is not None or any(dim is not None for dim in in_dims[3]):
        return one_by_one(operator, info, in_dims, *arguments)
    x = x.movedim(in_dims[2], 0).flatten(0, 1)
    y = operator(name, values, x, index, features)
    return y.unflatten(0, (info.batch_size, -1)), 0


_PRODUCT = "(str engine, Tensor values, Tensor x, Tensor[] index, int features) -> Tensor"

product = define(f"forward{_PRODUCT}", _compute_product, _like_activations, _Product, _folded)
"""``product(engine, values, x, index, out_features)``: W_A·x; the gradient of values is on B."""

input_gradient = define(
    f"input_gradient{_PRODUCT}",
    _compute_input_gradient,
    _like_activations,
    _Once,
    _folded,
)
"""``input_gradient(engine, values, g, index, in_features)``: W_Aᵀ·g."""

transposed_product = define(
    f"transposed_forward{_PRODUCT}",
    _compute_input_gradient,
    _like_activations,
    _TransposedProduct,
    _folded,
)
"""``transposed_product(engine, values, x, index, out_features)``: W_Aᵀ·x for a W of [in, out]."""

transposed_input_gradient = define(
    f"transposed_input_gradient{_PRODUCT}", _compute_product, _like_activations, _Once, _folded
)
"""``transposed_input_gradient(engine, values, g, index, in_features)``: W_A·g of the same."""

weight_gradient = define(
    "weight_gradient(str engine, Tensor g, Tensor x, Tensor[] index, Tensor values) -> Tensor",
    _compute_weight_gradient,
    _like_values,
    _Once,
)
"""``weight_gradient(engine, g, x, index, values)``: g·xᵀ sampled on B, as ``values``."""
