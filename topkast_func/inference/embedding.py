"""An embedding for inference that looks its rows up in the sparse weight of an output layer."""

import torch
from torch import Tensor, nn

from topkast_func.inference.linear import SparseLinear
from topkast_func.inference.replaceable import replaceable
from topkast_func.kernels.lookup import lookup


class SparseEmbedding(nn.Module):
    """An embedding whose weight is that of a linear layer, as in language models.

    Args:
        shared: The layer, which both have as a part: its tensors are there once.

    Attributes:
        shared: The same.
    """

    def __init__(self, shared: SparseLinear) -> None:
        super().__init__()
        self.shared = shared

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Return whether a layer does nothing but look up."""
        return (
            isinstance(layer, nn.Embedding)
            and replaceable(layer, (nn.Embedding,))
            and layer.max_norm is None
        )

    @property
    def weight(self) -> Tensor:
        """The weight, dense, [num_embeddings, embedding_dim]."""
        return self.shared.weight

    def forward(self, input: Tensor) -> Tensor:
        """Return what `torch.nn.Embedding` returns.

        Args:
            input: Indices of rows, int64 or int32, of any shape.

        Returns:
            [*input.shape, embedding_dim].

        Raises:
            TypeError: The indices are of another dtype.
            IndexError: One is of no row.
        """
        if input.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"indices must be int64 or int32, got {input.dtype}")
        of = self.shared
        index = of.crow_indices, of.col_indices
        found: Tensor = lookup(input.flatten(), of.values, *index, of.in_features)
        return found.view(*input.shape, of.in_features)
