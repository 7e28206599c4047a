"""Indices that a kernel may follow without looking at their numbers."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from topkast_func.reading import AsTheyAre


class Sound:
    """Tensors that are known to hold what they should: those that were given, until one is written.

    It holds them weakly.
    """

    def __init__(self) -> None:
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def add(self, tensors: Sequence[Tensor], about: Hashable) -> None:
        """Know tensors from now on.

        Args:
            tensors: At least one.
            about: What they go together with.
        """
        self._known[tensors[0]] = AsTheyAre.of(tensors), about

    def knows(self, tensors: Sequence[Tensor], about: Hashable) -> bool:
        """Return whether these tensors, in this order, were last added as they are.

        Those of inference mode are not known: nobody counts how often they are written to.
        """
        known, counted = self._known.get(tensors[0]), not any(map(Tensor.is_inference, tensors))
        return counted and known is not None and known[1] == about and known[0].are(tensors)


_ROWS = Sound()


def check_indices(values: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> None:
    """Check, once for each version of the indices, that none points beyond the matrix.

    Args:
        values: Stored entries, or blocks.
        rows: Where each row (of blocks) starts, int32, [rows + 1].
        columns: Column (of blocks) of each, int32.
        shape: Rows and columns (of blocks).

    Raises:
        TypeError: They are not int32.
        ValueError: There are not as many values.
        RuntimeError: An index does.
    """
    if values.shape[0] != columns.shape[0]:
        raise ValueError(f"{len(values)} values do not go with {len(columns)} col_indices")
    if not _ROWS.knows((columns, rows), shape):
        if wrong := {rows.dtype, columns.dtype} - {torch.int32}:
            raise TypeError(f"crow_indices and col_indices must be int32, got {wrong.pop()}")
        zeros = columns.new_zeros(columns.shape, dtype=torch.float32)
        torch._validate_sparse_csr_tensor_args(rows, columns, zeros, shape)
        _ROWS.add((columns, rows), shape)
