"""Indices of stored matrices, checked before a kernel follows them."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_SOUND: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Versions of the indices that have been checked, by the columns of their matrix."""


def check_indices(rows: Tensor, columns: Tensor, height: int, width: int) -> None:
    """Check, once for each version of the indices, that none points beyond the matrix.

    Args:
        rows: Where each row (of blocks) starts, int32, [height + 1].
        columns: Column (of blocks) of each, int32.
        height: Rows (of blocks).
        width: Columns (of blocks).

    Raises:
        RuntimeError: One does.
    """
    versions = (id(rows), _version(rows), _version(columns), height, width)
    if _SOUND.get(columns) == versions:
        return
    torch._validate_sparse_csr_tensor_args(
        rows, columns, columns.new_zeros(columns.shape, dtype=torch.float32), (height, width)
    )
    _SOUND[columns] = versions


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
