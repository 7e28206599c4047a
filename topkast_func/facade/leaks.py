"""Gradients that reach θ outside B: something computes with the parameter in place of α."""

from collections.abc import Iterable

import torch
from torch import nn

from topkast_func.bits import unpacked
from topkast_func.facade.sparse_weight import SparseWeight
from topkast_func.reading import readable
from topkast_func.warn import warn_caller


def say_what_leaks(weights: Iterable[tuple[nn.Module, SparseWeight]]) -> None:
    """Warn if the gradients of sparse weights reach what lies outside B.

    Args:
        weights: Sparse weights that an optimiser is about to move for the first time, with the
            layers that have them.
    """
    if names := [weight.rule.name for layer, weight in weights if _leaks(layer, weight)]:
        warn_caller(
            f"the gradient of {names} reaches what lies outside B, so something reads the "
            "parameter and not α: a reference to it that was kept (read the attribute of its layer "
            "in forward instead), a method other than forward, or a term of the loss on "
            "parameters (such as an L2 penalty of one's own: then nothing is amiss); or the sets "
            "were chosen anew after the backward pass. What lies outside B does not move"
        )


def _leaks(layer: nn.Module, weight: SparseWeight) -> bool:
    gradient = weight.raw(layer).grad
    if (
        weight.probe is not None
        or gradient is None
        or gradient.layout != torch.strided
        or not readable(gradient)
    ):
        return False
    outside = gradient[~unpacked(weight.backward_bits(layer), gradient.shape)]
    return bool((outside.isfinite() & (outside != 0.0)).any())  # a clipped NaN is everywhere
