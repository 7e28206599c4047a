"""Indices that a kernel may follow without looking at their numbers."""

from collections.abc import Hashable, Sequence
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from topkast_func.reading import version


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
        first, *others = tensors
        self._known[first] = ([*map(ref, others)], [*map(version, tensors)], about)

    def knows(self, tensors: Sequence[Tensor], about: Hashable) -> bool:
        """Return whether these tensors, in this order, were last added as they are."""
        first, *others = tensors
        known = self._known.get(first)
        if known is None:
            return False
        references, versions, was_about = known
        met = [one() for one in references]
        return (
            len(met) == len(others)
            and all(one is other for one, other in zip(met, others, strict=True))
            and versions == [*map(version, tensors)]
            and was_about == about
        )


_ROWS = Sound()


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
    if not _ROWS.knows((columns, rows), (height, width)):
        values = columns.new_zeros(columns.shape, dtype=torch.float32)
        torch._validate_sparse_csr_tensor_args(rows, columns, values, (height, width))
        _ROWS.add((columns, rows), (height, width))
