"""The forms of the exploration penalty, summed over tensors however they are stored."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from topkast_func.config import TopKastConfig
from topkast_func.config.allocation import shared_among_all
from topkast_func.sparsity import density
from topkast_func.types import Masks

Form: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]
"""The penalty of one tensor, of its parts on A and on B∖A, and its density; see `l2`."""


def l2(active: Tensor, exploring: Tensor, density: float) -> Tensor:
    """Return ½ (Σ_A θ² + Σ_{B∖A} θ² / D) of one tensor.

    Args:
        active: θ on A, zero or absent elsewhere.
        exploring: θ on B∖A, zero or absent elsewhere.
        density: D, fraction in (0, 1].

    Returns:
        The penalty, 0-d.
    """
    return 0.5 * (active.square().sum() + exploring.square().sum() / density)


def l1(active: Tensor, exploring: Tensor, density: float) -> Tensor:
    """Return Σ_A abs(θ) + Σ_{B∖A} abs(θ) / D of one tensor; see `l2` for the arguments."""
    return active.abs().sum() + exploring.abs().sum() / density


def group_l2(active: Tensor, exploring: Tensor, density: float) -> Tensor:
    """Return ‖θ_A‖₂ + ‖θ_{B∖A}‖₂ / D of one tensor; see `l2` for the arguments."""
    norm: Callable[[Tensor], Tensor] = torch.linalg.vector_norm
    return norm(active) + norm(exploring) / density


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor of half precision in float32, in which it is summed; others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


FORMS: dict[str, Form] = {"l2": l2, "l1": l1, "group_l2": group_l2}


class Terms(NamedTuple):
    """What the penalty sums at a step.

    Attributes:
        form: The penalty of one tensor, see `l2`.
        densities: D of the sparse tensors by name; empty where there is no penalty.
    """

    form: Form
    densities: dict[str, float]


def terms_of(shapes: Mapping[str, torch.Size], config: TopKastConfig, step: int = 0) -> Terms:
    """Return what the penalty sums.

    Args:
        shapes: Shapes of the sparse tensors by name.
        config: Form of the penalty and densities.
        step: Number of the step.

    Returns:
        The terms.

    Raises:
        ValueError: The configuration gives a sparse tensor no sparsity.
    """
    if config.penalty is None or not config.method.explores:
        return Terms(l2, {})
    found = shared_among_all(shapes, config, step)
    densities = {name: density(sparsity.forward) for name, sparsity in found.items()}
    return Terms(FORMS[config.penalty], densities)


def summed_penalty(
    terms: Terms, parts: Callable[[str], tuple[Tensor, Tensor]], device: torch.device
) -> Tensor:
    """Sum the penalty over sparse tensors, however they are stored; see `exploration_penalty`.

    Args:
        terms: What it sums.
        parts: ``parts(name)`` to θ on A and θ on B∖A, zero or absent elsewhere.
        device: Where the sum is made.

    Returns:
        The penalty, 0-d.
    """
    total = torch.zeros((), dtype=torch.float32, device=device)
    for name, share in terms.densities.items():
        active, exploring = map(widened, parts(name))
        total = total + terms.form(active, exploring, share)
    return total


def masked_parts(theta: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
    """Return θ on A and θ on B∖A, zero elsewhere."""
    active = torch.where(masks.forward, theta, 0.0)
    return active, torch.where(masks.backward & ~masks.forward, theta, 0.0)
