"""Steps of optimisers that end in an error: torch calls no hook of theirs after it."""

from collections.abc import Callable, Iterator
from functools import wraps
from types import CodeType, FunctionType
from typing import Any

from torch.optim import Optimizer

HOOKED: CodeType = next(
    part for part in Optimizer.profile_hook_step.__code__.co_consts if isinstance(part, CodeType)
)
"""What torch makes of the ``step`` of a class: it runs the hooks around the function ``func``."""

STEP = HOOKED.co_freevars.index("func")


def hold_on_to(kind: type[Optimizer], around: Callable[..., Any]) -> None:
    """Let what goes around the steps of a class go around each function that moves weights in one.

    The hooks stay outside of it. The function is changed where torch holds it, as whoever has the
    ``step`` of an optimiser already, such as a learning rate scheduler, calls that from now on too.

    Args:
        kind: The class, of whose bases some may have a step of their own.
        around: ``around(function, optimizer, …)`` is called in place of ``function(optimizer, …)``.
    """
    for hooked in _hooked_steps(kind):
        cell = (hooked.__closure__ or ())[STEP]
        if getattr(cell.cell_contents, "_held", None) is not around:
            cell.cell_contents = _held(cell.cell_contents, around)


def _hooked_steps(kind: type[Optimizer]) -> Iterator[FunctionType]:
    for base in kind.__mro__:
        step: Any = vars(base).get("step")
        while step is not None:
            if getattr(step, "__code__", None) is HOOKED:
                yield step
            step = getattr(step, "__wrapped__", None)


def _held(function: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def step(*inputs: Any, **options: Any) -> Any:
        return around(function, *inputs, **options)

    vars(step)["_held"] = around
    return step
