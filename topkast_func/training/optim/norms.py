"""The norm of all tensors together, those that other processes have included."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from topkast_func.elsewhere import Elsewhere
from topkast_func.training.optim.transformation import wide
from topkast_func.types import Params

_ELSEWHERE: Elsewhere[Callable[[Tensor], Tensor]] = Elsewhere()
"""How to sum over the processes that have some of the tensors each."""


def global_norm(tensors: Params) -> Tensor:
    """Return the Euclidean norm of all tensors together.

    Args:
        tensors: Any.

    Returns:
        The norm, 0-d, in float32 at the least; zero of none.
    """
    each = [torch.linalg.vector_norm(wide(tensor)) for tensor in tensors.values()]
    norms = torch.stack(each) if each else torch.zeros(0, device="cpu")
    total = _ELSEWHERE.taken
    if total is not None:  # in float64 the root of a square is the number itself
        norms = total(norms.double().square()).sqrt().to(norms.dtype)
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


def summed_by(total: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """Let `global_norm` be that of the tensors of several processes, in this thread, for a while.

    Each entry of a tensor is on one of them.

    Args:
        total: Returns the sum of a tensor over the processes.

    Returns:
        The time in which it is.
    """
    return _ELSEWHERE.by(total)
