"""The products of a layer as operators, opaque to whatever traces them, with their gradients.

The gradient is a kernel of the operator itself. `torch.compile` keeps the call as it stands,
where it would inline a `torch.autograd.Function` and, under a compiled `torch.func.grad`, drop
its backward without a word.
"""

import inspect
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction
from torch.library import Library, register_fake, register_vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from topkast_func.kernels.engines import engine as engine_of
from topkast_func.kernels.pattern import nested


@contextmanager
def _one_level_down() -> Iterator[None]:
    """Leave this level of autograd, and let those below it, of `torch.func`, record the call."""
    with torch.enable_grad(), _set_fwd_grad_enabled(True), _AutoDispatchBelowAutograd():
        yield


class _Product(_SingleLevelFunction):
    """W_A·x with its gradients, all in the layout of an engine."""

    @staticmethod
    def forward(name: str, features: int, values: Tensor, x: Tensor, *index: Tensor) -> Tensor:
        with _one_level_down():
            return product(name, values, x, index, features)

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
            for_values = weight_gradient(ctx.engine, g, x, index, values)
        if ctx.needs_input_grad[3]:
            for_x = input_gradient(ctx.engine, values, g, index, x.shape[1])
        return None, None, for_values, for_x, *[None] * len(index)


class _Gradient(_SingleLevelFunction):
    """A gradient of the product, which refuses to be differentiated again."""

    @staticmethod
    def forward(gradient: Any, name: str, a: Tensor, b: Tensor, last: Any, *index: Tensor) -> Any:
        with _one_level_down():
            return gradient(name, a, b, index, last)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(
            "a sparse product cannot be differentiated twice; storage='dense' can be"
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


def _batched(operator: Any, info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    """Fold a batch of activations alone into one call; else run the calls one by one."""
    leaves, tree = tree_flatten(arguments)
    dims = tree_flatten(in_dims, is_leaf=lambda dim: dim is None)[0]
    batched = [i for i, dim in enumerate(dims) if dim is not None]
    if batched == [_ACTIVATIONS] and operator is not weight_gradient:
        leaves[_ACTIVATIONS] = leaves[_ACTIVATIONS].movedim(dims[_ACTIVATIONS], 0).flatten(0, 1)
        folded = operator(*tree_unflatten(leaves, tree))
        return folded.unflatten(0, (info.batch_size, -1)), 0
    results = []
    for call in range(info.batch_size):
        one = [leaves[i].select(dims[i], call) if i in batched else x for i, x in enumerate(leaves)]
        results.append(operator(*tree_unflatten(one, tree)))
    return torch.stack(results), 0


_ACTIVATIONS = 2
"""Place of the activations among the arguments of a product."""


def _record_product(
    name: str, values: Tensor, x: Tensor, index: list[Tensor], features: int
) -> Tensor:
    return _recorded(_Product, name, features, values, x, *index)


def _record_gradient(
    operator: Any, name: str, a: Tensor, b: Tensor, index: list[Tensor], last: Any
) -> Tensor:
    return _recorded(_Gradient, operator, name, a, b, last, *index)


def _recorded(function: Any, *arguments: Any) -> Tensor:
    """Call a function of one level of autograd, which the dispatcher of torch has led us to."""
    with enable_single_level_autograd_function():
        result: Tensor = function.apply(*arguments)
    return result


def _code() -> str:
    """Name what this file says: graphs that torch caches on disk hold the gradients above."""
    return f"v{zlib.crc32(inspect.getsource(sys.modules[__name__]).encode()):x}"


_LIBRARY, _VERSION = Library("topkast_func", "DEF"), _code()


def _define(
    schema: str,
    compute: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    record: Callable[..., Tensor] | None = None,
) -> Any:
    """Define an operator for every device, with its fake kernel, its gradient and its batching."""
    name, arguments = schema.split("(")
    _LIBRARY.define(f"{name}.{_VERSION}({arguments}")
    operator = getattr(getattr(torch.ops.topkast_func, name), _VERSION)
    _LIBRARY.impl(operator, compute, "CompositeExplicitAutograd")
    _LIBRARY.impl(operator, record or partial(_record_gradient, operator), "Autograd")
    register_fake(operator, fake, lib=_LIBRARY)
    register_vmap(operator, partial(_batched, operator), lib=_LIBRARY)
    return operator


_PRODUCT = "(str engine, Tensor values, Tensor x, Tensor[] index, int features) -> Tensor"

product = _define(f"forward{_PRODUCT}", _compute_product, _like_activations, _record_product)
"""``product(engine, values, x, index, out_features)``: W_A·x; the gradient of values is on B."""

input_gradient = _define(f"input_gradient{_PRODUCT}", _compute_input_gradient, _like_activations)
"""``input_gradient(engine, values, g, index, in_features)``: W_Aᵀ·g."""

weight_gradient = _define(
    "weight_gradient(str engine, Tensor g, Tensor x, Tensor[] index, Tensor values) -> Tensor",
    _compute_weight_gradient,
    _like_values,
)
"""``weight_gradient(engine, g, x, index, values)``: g·xᵀ sampled on B, as ``values``."""
