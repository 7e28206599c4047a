"""Who reads θ, where it may be meant to compute with α: modules and hooks around a sparse one."""

import sys
from types import FrameType
from weakref import WeakSet

import torch
from torch import nn

from topkast_func.facade.sparse_weight import SparseWeight
from topkast_func.warn import is_inner, warn_caller

CALL = nn.Module._call_impl.__code__
"""What runs the hooks and the forward pass of any module."""

_TOLD: "WeakSet[SparseWeight]" = WeakSet()


def say_who_reads(weight: SparseWeight) -> None:
    """Warn, once, if a weight is read as θ within the call of a module that is not sparse.

    Args:
        weight: The weight; who reads it is the caller of the caller.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or weight in _TOLD:
        return
    frame: FrameType | None = sys._getframe(2)
    if frame is None or is_inner(frame):
        return
    while frame is not None and frame.f_code is not CALL:
        frame = frame.f_back
    if frame is not None:
        _TOLD.add(weight)
        warn_caller(
            f"{weight.rule.name!r} reads as θ, dense, where it is read here: in a hook of the "
            "outermost sparse module, or in the forward pass of a module around it, it is α in "
            "the forward pass of the sparse one alone. To compute with it, as tied layers do, "
            "sparsify the module around it; to look at it, or to penalize it, nothing is amiss"
        )
