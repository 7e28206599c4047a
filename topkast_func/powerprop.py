"""Powerpropagation: weights as signed powers of what is trained."""

import torch
from torch import Tensor


def theta_of(phi: Tensor, exponent: float | Tensor) -> Tensor:
    """Return θ = φ·abs(φ)^(a−1) (Schwarz et al., "Powerpropagation", NeurIPS 2021, section 2).

    Its derivative is a·abs(φ)^(a−1): small weights learn slowly, and at 0 not at all.

    Args:
        phi: What is trained.
        exponent: a > 1.

    Returns:
        θ, of the shape and dtype of ``phi``.
    """
    away = phi != 0
    power = torch.where(away, phi.abs(), 1.0).pow(exponent - 1)
    return torch.where(away, phi * power, 0.0).to(phi.dtype)


def check_moves(name: str, theta: Tensor, exponent: float) -> None:
    """Check that a weight has an entry other than 0: from there alone a power has a gradient.

    Args:
        name: Name of the weight, for errors.
        theta: The weight.
        exponent: a > 1.

    Raises:
        ValueError: All entries are 0.
    """
    if not theta.any():
        raise ValueError(
            f"params[{name!r}] is zero everywhere and would stay so: with powerprop={exponent} "
            "the gradient of a zero is zero. Initialise it, name it in keep_dense, or let "
            "powerprop be 1"
        )


def phi_of(theta: Tensor, exponent: float) -> Tensor:
    """Return φ = sign(θ)·abs(θ)^(1/a); inverse of `theta_of`."""
    return theta.sign() * theta.abs().pow(1 / exponent)
