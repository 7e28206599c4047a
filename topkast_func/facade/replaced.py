"""What torch puts into the place of a weight that is sparse by now: it is refused, before it is."""

import sys
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import remove_parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

WAY_ON = "tk.densify the model, remove the {} after that, and sparsify it again"
HAD = "{!r} was {} before tk.sparsify, whose layers keep what they had then: " + WAY_ON

REMOVALS: dict[CodeType, str] = {
    WeightNorm.remove.__code__: "weight norm",
    SpectralNorm.remove.__code__: "spectral norm",
    BasePruningMethod.remove.__code__: "pruning",
}
"""What takes away a weight that is computed from one that is sparse, which it reads before."""


def check_nested(model: nn.Module, keys: Iterable[str]) -> None:
    """Check that no hook of a module computes another tensor from its own sparse weights.

    Hooks before the forward pass of the outermost module run while a weight reads as θ.

    Args:
        model: The outermost module.
        keys: The names of its own parameters that are to be sparse.

    Raises:
        ValueError: One does.
    """
    for hook in model._forward_pre_hooks.values():
        name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
        if not isinstance(hook, BasePruningMethod | SpectralNorm | WeightNorm):
            continue
        if found := [key for key in keys if key.startswith(f"{name}_")]:
            raise ValueError(
                f"{found} cannot be sparse: {type(hook).__name__} computes {name!r} from it before "
                "the forward pass of the model begins, in which alone it reads as α; sparsify "
                "torch.nn.Sequential(model), in which it does"
            )


def check_kept(plain: type) -> None:
    """Check that nobody removes a parametrization that a layer had before it was sparse.

    Args:
        plain: The class that the layer had then; who reads the parametrizations is the caller of
            the caller.

    Raises:
        ValueError: It is to be removed.
    """
    reader = sys._getframe(2)
    if reader.f_code is remove_parametrizations.__code__:
        name: Any = reader.f_locals["tensor_name"]
        if name in vars(plain):
            raise ValueError(HAD.format(name, "parametrized", "parametrization"))


def check_stays(key: str) -> None:
    """Check that who reads a weight does not do so to put its values into the place of it.

    Args:
        key: Name of the weight in its layer; who reads it is the caller of the caller.

    Raises:
        ValueError: It does.
    """
    if torch.compiler.is_compiling():
        return
    frame: FrameType | None = sys._getframe(2)
    for _ in range(2):
        if frame is not None and (way := REMOVALS.get(frame.f_code)):
            raise ValueError(HAD.format(key, f"part of a {way}", way))
        frame = None if frame is None else frame.f_back
