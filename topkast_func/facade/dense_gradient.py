"""Zeros that are added to α, whose gradient is that of the loss at α in every entry.

It is kept as torch keeps that of the parameter: what `zero_grad` has thrown away counts no more,
and what a backward pass computes while the parameter is frozen never does.
"""

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle, unserializable_hook

SUCCESSOR = "_in_place_of_it"


def zeros_for(raw: Tensor) -> Tensor:
    """Return zeros that are to be added to the α of a parameter."""
    return torch.zeros_like(raw, requires_grad=True)


def moved(probe: Tensor | None, raw: Tensor) -> Tensor | None:
    """Return the zeros in place of others, once the parameter has been moved or cast.

    Args:
        probe: The zeros before; weights that are tied have the same, and so they do after.
        raw: The parameter as it is now.

    Returns:
        The zeros; None if there were none.
    """
    if probe is None:
        return None
    known: Tensor | None = getattr(probe, SUCCESSOR, None)
    if known is None or (known.dtype, known.device) != (raw.dtype, raw.device):
        known = zeros_for(raw)
        setattr(probe, SUCCESSOR, known)
    return known


class InStep:
    """Clears the gradient of zeros wherever that of the parameter has been cleared.

    It may have been set to 0, which tells nothing where it was 0 before, as it can be on B alone.

    Args:
        probe: The zeros.
        raw: The parameter.
    """

    def __init__(self, probe: Tensor, raw: Any) -> None:
        self._probe, self._raw, self._last, self._tells = probe, raw, -1, True
        self._left: ref[Tensor] | None = None
        self._dropped = False
        _hook(probe, self._before_probe)
        self._hooks = (
            (_hook(raw, self._before_raw), raw.register_post_accumulate_grad_hook(self._after_raw))
            if raw.requires_grad
            else ()
        )

    def remove(self) -> None:
        """Take the hooks off the parameter again."""
        for hook in self._hooks:
            hook.remove()

    def settle(self) -> None:
        """Look at the parameter: what was computed before its gradient was cleared is none."""
        gradient = self._raw.grad
        if gradient is None or (self._tells and not gradient.any()):
            self._dropped |= self._probe.grad is not None
            self._probe.grad = None

    def is_replaced(self) -> bool:
        """Return whether gradients were cleared, and another stands where the last one was left."""
        left = self._left and self._left()
        return self._dropped and self._raw.grad is not None and self._raw.grad is not left

    def _begin(self) -> None:
        """Look at the parameter before either has the gradient of this backward pass."""
        if self._last != (current := torch._C._current_graph_task_id()):
            self._last = current
            self.settle()

    def _before_probe(self, gradient: Tensor) -> Tensor | None:
        self._begin()
        return None if self._raw.requires_grad else torch.zeros_like(gradient)

    def _before_raw(self, _: Tensor) -> None:
        self._begin()

    def _after_raw(self, raw: Tensor) -> None:
        self._tells = raw.grad is None or bool(raw.grad.any())
        self._left = None if raw.grad is None else ref(raw.grad)


def kept_in_step(probe: Tensor | None, raw: Tensor, before: InStep | None = None) -> InStep | None:
    """Let the gradient of zeros be cleared wherever that of the parameter has been.

    Args:
        probe: The zeros; None if there are none.
        raw: The parameter.
        before: What this returned last for the parameter, whose hooks it then takes off.

    Returns:
        What takes the hooks off the parameter again; None without zeros.
    """
    if before is not None:
        before.remove()
    return None if probe is None else InStep(probe, raw)


def _hook(tensor: Any, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    def call(gradient: Tensor) -> Tensor | None:
        return hook(gradient)

    mark: Any = unserializable_hook
    handle: RemovableHandle = tensor.register_hook(mark(call))
    return handle
