"""Gradients at α of every entry, for methods that choose by them: those of zeros added to α."""

import torch

from topkast_func.facade.dense_gradient import kept_in_step, zeros_for
from topkast_func.facade.owners import Owners, first
from topkast_func.methods import Method
from topkast_func.types import Tensors
from topkast_func.warn import warn_caller

REPLACED = (
    "{} chooses by what the last backward pass has left of {}: what passes before it left was "
    "cleared, and other gradients, which know of B alone, were put into parameter.grad. Let the "
    "gradients of several losses add up there, or add up the losses"
)


def ask_for_gradients(owners: Owners, asked: bool) -> None:
    """Let the next backward pass leave the gradient of every entry, or no more.

    Args:
        owners: The sparse weights.
        asked: Whether it is to.
    """
    for several in owners.values():
        layer, weight = several[0]
        probe = zeros_for(weight.raw(layer)) if asked else None
        for layer, weight in several:
            weight.probe = probe
            weight.asked = kept_in_step(probe, weight.raw(layer), weight.asked)


def gradients_asked_for(owners: Owners, method: Method) -> Tensors:
    """Return the gradients that backward passes of this process have left.

    Args:
        owners: The sparse weights.
        method: Who reads them.

    Returns:
        Gradients by name, zeros where the loss did not depend on the weight.

    Raises:
        RuntimeError: There are none, and a weight is trained.
    """
    found = first(owners)
    raw = {name: weight.raw(layer).detach() for name, (layer, weight) in found.items()}
    left = {
        name: weight.probe.grad for name, (_, weight) in found.items() if weight.probe is not None
    }
    trained = any(weight.raw(layer).requires_grad for layer, weight in found.values())
    if trained and all(gradient is None for gradient in left.values()):
        raise RuntimeError(
            f"{method} chooses by the gradient at α of every entry, and there is none: "
            "loss.backward() leaves it in the step before, torch.autograd.grad of the parameters "
            "does not; with refresh_every=None that of any step is kept"
        )
    asked = {name: weight.asked for name, (_, weight) in found.items()}
    if replaced := [name for name, seen in asked.items() if seen and seen.is_replaced()]:
        warn_caller(REPLACED.format(method, replaced))
    return {
        name: torch.zeros_like(theta) if (gradient := left.get(name)) is None else gradient
        for name, theta in raw.items()
    }
