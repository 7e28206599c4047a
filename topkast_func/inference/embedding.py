"""An embedding for inference that looks its rows up in the sparse weight of an output layer."""

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

from topkast_func.inference.linear import SparseLinear
from topkast_func.inference.replaceable import replaceable
from topkast_func.kernels.inference import dense_matrix
from topkast_func.kernels.lookup import lookup


class SparseEmbedding(nn.Module):
    """An embedding whose weight is that of a linear layer, as in language models.

    Args:
        layer: The layer, whose tensors it has as well, as tied layers have.

    Attributes:
        values: See `SparseLinear`.
        crow_indices: The same.
        col_indices: The same.
        padding_idx: The row that has no gradient, or None.
    """

    crow_indices: Tensor
    col_indices: Tensor
    padding_idx: int | None = None

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = layer.out_features, layer.in_features
        self.values = layer.values
        self.register_buffer("crow_indices", layer.crow_indices)
        self.register_buffer("col_indices", layer.col_indices)

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Return whether a layer does nothing but look up."""
        return (
            isinstance(layer, nn.Embedding)
            and replaceable(layer, (nn.Embedding,))
            and layer.max_norm is None
            and not layer.scale_grad_by_freq
        )

    @property
    def weight(self) -> Tensor:
        """The weight, dense, [num_embeddings, embedding_dim]."""
        shape = (self.num_embeddings, self.embedding_dim)
        return dense_matrix(self.values, self.crow_indices, self.col_indices, shape)

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
        index = self.crow_indices, self.col_indices
        found: Tensor = lookup(input.flatten(), self.values, *index, self.embedding_dim)
        # torch.jit.trace traces twice, the second time without gradients, and wants one graph
        if self.padding_idx is not None and (
            torch.is_grad_enabled() or is_tracing()  # type: ignore[no-untyped-call]
        ):
            padding = input.flatten()[:, None] == self.padding_idx
            found = torch.where(padding, found.detach(), found)
        return found.view(*input.shape, self.embedding_dim)
