"""The norm of all tensors together, those that other processes have included."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from topkast_func.training.optim.transformation import wide
from topkast_func.types import Params


class _Elsewhere(threading.local):
    """Of each thread: how to sum over the processes that have some of the tensors each."""

    def __init__(self) -> None:  # in each thread: Dynamo guards what the instance itself holds
        self.total: Callable[[Tensor], Tensor] | None = None


_ELSEWHERE = _Elsewhere()


def global_norm(tensors: Params) -> Tensor:
    """Return the Euclidean norm of all tensors together.

    Args:
        tensors: Any, at least one.

    Returns:
        The norm, 0-d, in float32 at the least.
    """
    norms = torch.stack([torch.linalg.vector_norm(wide(tensor)) for tensor in tensors.values()])
    total = _ELSEWHERE.total
    if total is not None:  # in float64 the root of a square is the number itself
        norms = total(norms.double().square()).sqrt().to(norms.dtype)
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


@contextmanager
def summed_by(total: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `global_norm` be that of the tensors of several processes, in this thread, for a while.

    Each entry of a tensor is on one of them.

    Args:
        total: Returns the sum of a tensor over the processes.

    Yields:
        Nothing.
    """
    _ELSEWHERE.total = total
    try:
        yield
    finally:
        _ELSEWHERE.total = None
