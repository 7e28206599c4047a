"""Zeros that are added to α, whose gradient is that of the loss at α in every entry.

It is kept as torch keeps that of the parameter: what `zero_grad` has thrown away counts no more,
and what a backward pass computes while the parameter is frozen never does.
"""

from typing import Any

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


def kept_in_step(
    probe: Tensor | None, raw: Tensor, before: RemovableHandle | None = None
) -> RemovableHandle | None:
    """Let the gradient of zeros be cleared wherever that of the parameter has been.

    Args:
        probe: The zeros; None if there are none.
        raw: The parameter.
        before: What this returned last for the parameter, whose hook it then takes off.

    Returns:
        What takes the hook off the parameter again; None if it has none.
    """
    if before is not None:
        before.remove()
    if probe is None:
        return None
    last = -1

    def begin() -> None:
        """Look at the parameter before either has the gradient of this backward pass."""
        nonlocal last
        if last != (current := torch._C._current_graph_task_id()):
            last = current
            if raw.grad is None or not raw.grad.any():
                probe.grad = None

    def before_probe(gradient: Tensor) -> Tensor | None:
        begin()
        return None if raw.requires_grad else torch.zeros_like(gradient)

    def before_raw(_: Tensor) -> None:
        begin()

    _hook(probe, before_probe)
    return _hook(raw, before_raw) if raw.requires_grad else None


def _hook(tensor: Any, hook: Any) -> RemovableHandle:
    mark: Any = unserializable_hook
    handle: RemovableHandle = tensor.register_hook(mark(hook))
    return handle
