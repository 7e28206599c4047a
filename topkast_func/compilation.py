"""torch.compile for a pure step: one graph, and a clear word where that cannot be."""

import warnings
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

ONE_GRAPH: Mapping[str, Any] = {"fullgraph": True}
AS_EAGER: Mapping[str, Any] = {"options": {"fallback_random": True}}
"""Random numbers (dropout) drawn as the eager step draws them."""

EAGER = (
    "train_step runs eager, which on small models is slower by a multiple: torch.compile failed "
    "on this machine ({}); a C++ compiler such as g++ is what it usually lacks"
)
BROKEN = (
    "the model or loss_fn breaks the graph of train_step: take the break out, or pass "
    "make_train_step(..., compile={{'fullgraph': False}}) or compile=False. The break: {}"
)


def compiled(step: Callable[..., Any], compile: bool | Mapping[str, Any]) -> Callable[..., Any]:
    """Compile a pure step.

    A fault of the caller's own (a loss that is no scalar, a batch the model refuses) raises
    as it does in eager mode. Where the machine cannot compile, the step runs eager after one
    warning.

    Args:
        step: A pure function of tensors.
        compile: False for the step as it is, True for one graph, or options of
            `torch.compile`, taken as they are over ``fullgraph=True``.

    Returns:
        The compiled step. It raises RuntimeError, naming the break and the way on, where the
        model or loss breaks the graph.
    """
    if compile is False:
        return step
    options = {**ONE_GRAPH, **(AS_EAGER if compile is True else compile)}
    fast: Callable[..., Any] = torch.compile(_fresh(step), **options)

    def call(*arguments: Any) -> Any:
        nonlocal fast
        try:
            return fast(*arguments)
        except BackendCompilerFailed as failure:
            warnings.warn(EAGER.format(_first_line(failure)), stacklevel=3)
            fast = step
        except TorchDynamoException as failure:
            broken = failure
        result = step(*arguments)
        if fast is step:
            return result
        raise RuntimeError(BROKEN.format(broken)) from broken

    return call


def _fresh(step: Any) -> FunctionType:
    """Copy a function with code of its own: Dynamo counts recompiles per code object."""
    return FunctionType(
        step.__code__.replace(),
        step.__globals__,
        step.__name__,
        step.__defaults__,
        step.__closure__,
    )


def _first_line(reason: Exception) -> str:
    return str(reason).strip().splitlines()[0]
