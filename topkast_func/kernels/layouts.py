"""Tensors of torch's sparse layouts, made without its warning that they are in beta."""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor


def csr_matrix(
    rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int], check: bool = False
) -> Tensor:
    """Return a matrix of layout CSR, or BSR where the values are blocks, that shares its parts.

    Args:
        rows: Where each row (of blocks) starts, [rows + 1].
        columns: Column (of blocks) of each, [stored].
        values: [stored], or [blocks, r, c].
        shape: Of the matrix.
        check: Whether the parts are checked.

    Returns:
        The matrix.
    """
    _say_it_unheard()
    make: Any = torch.sparse_csr_tensor if values.ndim == 1 else torch.sparse_bsr_tensor
    matrix: Tensor = make(
        rows, columns, values, shape, device=values.device, check_invariants=check
    )
    return matrix


@cache
def _say_it_unheard() -> None:
    """Let torch warn that CSR is in beta, which it does once a process, with warnings ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = torch.zeros(0, dtype=torch.int64, device="cpu")
        torch.sparse_csr_tensor([0], empty, empty, (0, 0), device="cpu")
