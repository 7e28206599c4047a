"""Operators of this package, opaque to whatever traces them, each with a gradient of its own.

The gradient is a kernel of the operator itself. `torch.compile` keeps the call as it stands,
where it would inline a `torch.autograd.Function` and, under a compiled `torch.func.grad`, drop
its backward without a word.
"""

import inspect
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _AutoDispatchBelowAutograd,
    _dispatch_keys,
    _len_torch_dispatch_stack,
)
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.library import Library, register_fake, register_vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

_LIBRARY = Library("topkast_func", "DEF")

_PACKAGE = zlib.crc32(b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))))
"""What tells one version of this package from another."""

_APART = getattr(torch.Tag, "cudagraph_unsafe", None)
"""What leaves an operator out of CUDA graphs, in torch versions that can."""

_ORDINARY = _dispatch_keys(torch.empty(0, device="cpu")).raw_repr()
"""What torch decides by where it computes with a tensor in the memory of the CPU."""


class Gradient(_SingleLevelFunction):
    """The gradient of an operator; its parts get what computes it first, then its arguments.

    A `torch.autograd.Function` but for its base: the dispatcher calls it once for each level of
    autograd and `torch.func`, where a Function would find its way through them by itself.
    """

    @staticmethod
    def forward(below: Callable[..., Any], *arguments: Any) -> Any:
        """Compute the operator; forward mode takes no view of a larger tensor for its result."""
        result = below(*arguments)
        return result.clone() if result._is_view() else result


def define(
    schema: str,
    compute: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    gradient: type[Gradient] | None = None,
    batched: Callable[..., tuple[Tensor, int]] | None = None,
    waits: bool = False,
) -> Any:
    """Define an operator for every device.

    Its overload is named after the code of the module that has ``compute`` and of this package:
    graphs that torch caches on disk hold the gradient that was there when they were traced, and
    the operators which that calls.

    Args:
        schema: Its name, arguments and result, as torch writes them.
        compute: Computes it, of tensors that autograd does not follow.
        fake: Returns an empty tensor like its result.
        gradient: Its gradient; None for integers.
        batched: ``batched(operator, info, in_dims, *arguments)`` is its `torch.vmap`, see
            `torch.library.register_vmap`; None for as many calls as there are samples.
        waits: Whether the host waits for numbers in it, which it cannot in a CUDA graph.

    Returns:
        The operator.
    """
    name, arguments = schema.split("(", 1)
    code = inspect.getsource(sys.modules[compute.__module__]).encode()
    overload = f"v{zlib.crc32(code, _PACKAGE):x}"
    tags = (_APART,) if waits and _APART else ()
    _LIBRARY.define(f"{name}.{overload}({arguments}", tags=tags)
    operator = getattr(getattr(torch.ops.topkast_func, name), overload)
    _LIBRARY.impl(operator, _untraced(compute), "CompositeExplicitAutograd")
    if gradient:
        record = _untraced(partial(_record, gradient, operator, compute))
        _LIBRARY.impl(operator, record, "Autograd")
    register_fake(operator, fake, lib=_LIBRARY)
    register_vmap(operator, partial(batched or one_by_one, operator), lib=_LIBRARY)
    return operator


def _untraced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep Dynamo out of a function: it would look into it where it has broken a graph."""
    hidden: list[Callable[..., Tensor]] = []

    def call(*arguments: Any) -> Tensor:
        traced = torch.compiler.is_dynamo_compiling()
        if not traced and get_eval_frame_callback() is None:
            return function(*arguments)
        if not hidden:
            hidden.append(sys.modules["torch._dynamo"].disable(function))
        return hidden[0](*arguments)

    return call


def _record(
    gradient: Any, operator: Any, compute: Callable[..., Tensor], *arguments: Any
) -> Tensor:
    plain = _is_plain(arguments)
    if not _is_followed(arguments):
        if plain:
            return compute(*arguments)
        with _AutoDispatchBelowAutograd():
            below: Tensor = operator(*arguments)
        return below
    with enable_single_level_autograd_function():
        result: Tensor = gradient.apply(compute if plain else partial(_below, operator), *arguments)
    return result


def _below(operator: Any, *arguments: Any) -> Any:
    """Call an operator one level down, where it is recorded again if that asks for it."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _AutoDispatchBelowAutograd():
        return operator(*arguments)


def _is_plain(arguments: Any) -> bool:
    """Return whether nothing but `compute` is below autograd: tensors in memory, and no modes."""
    if peek_interpreter_stack() is not None or _len_torch_dispatch_stack():
        return False
    tensors = (argument for argument in arguments if isinstance(argument, Tensor))
    return all(_dispatch_keys(tensor).raw_repr() == _ORDINARY for tensor in tensors)


def derives() -> bool:
    """Return whether forward mode or a transform of `torch.func` may ask for derivatives."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def _is_followed(arguments: Any) -> bool:
    """Return whether a derivative of what is done with the arguments may be asked for."""
    if derives():
        return True
    tensors = (argument for argument in arguments if isinstance(argument, Tensor))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def one_by_one(operator: Any, info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    """Batch an operator by as many calls as there are samples."""
    leaves, tree = tree_flatten(arguments)
    dims = tree_flatten(in_dims, is_leaf=lambda dim: dim is None)[0]
    samples = [
        [
            leaf if dim is None else leaf.select(dim, i)
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        for i in range(info.batch_size)
    ]
    return torch.stack([operator(*tree_unflatten(sample, tree)) for sample in samples]), 0
