"""Products by torch-sparse, the library the seed computes with."""

import torch
import torch_sparse
from torch import Tensor

from topkast_func.kernels.pattern import Pattern
from topkast_func.kernels.reference import entries, weight_gradient

__all__ = ["forward", "input_gradient", "weight_gradient"]


def forward(values: Tensor, x: Tensor, pattern: Pattern, features: int) -> Tensor:
    """Return x·W_Aᵀ of activations [batch, in]."""
    row, column = entries(pattern.forward, values, (features, x.shape[1]))
    return _product(row, column, values, features, x)


def input_gradient(values: Tensor, g: Tensor, pattern: Pattern, features: int) -> Tensor:
    """Return g·W_A of gradients [batch, out]."""
    row, column = entries(pattern.forward, values, (g.shape[1], features))
    return _product(column, row, values, features, g)


def _product(to: Tensor, of: Tensor, values: Tensor, features: int, x: Tensor) -> Tensor:
    index = torch.stack((to.flatten(), of.flatten()))
    stored = values[: to.shape[0]].flatten()
    product: Tensor = torch_sparse.spmm(index, stored, features, x.shape[1], x.t())
    return product.t().contiguous()
