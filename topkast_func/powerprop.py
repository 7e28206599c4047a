"""Powerpropagation: weights as signed powers of what is trained."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from topkast_func.reading import readable

_PHI: list[Callable[[], Iterable[Tensor]]] = []
"""Who knows of parameters of modules that hold φ."""


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
    return theta.abs().pow_(1 / exponent).copysign_(theta)


def phi_is_told_by(who: Callable[[], Iterable[Tensor]]) -> Callable[[], Iterable[Tensor]]:
    """Let `check_theta` ask somebody for parameters that hold φ, from now on; return who."""
    _PHI.append(who)
    return who


def check_theta(params: Mapping[str, object]) -> None:
    """Check that no weight is the φ that a module holds, or shares its memory.

    Args:
        params: θ by name.

    Raises:
        ValueError: One is.
    """
    if torch.compiler.is_compiling():
        return
    phi = {place for who in _PHI for tensor in who() if (place := _place(tensor))}
    if phi and (found := [name for name, leaf in params.items() if _place(leaf) in phi]):
        raise ValueError(
            f"params {found} are φ of powerpropagation, which tk.sparsify has put in the place of "
            "θ: give θ itself, as sparsifier.dense_params() returns it"
        )


def _place(tensor: object) -> int | None:
    """Return where the numbers of a tensor stand; None where that is nowhere, or not told."""
    if not isinstance(tensor, Tensor) or not readable(tensor):
        return None
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return tensor.data_ptr() or None if strided else None
