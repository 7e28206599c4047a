"""A trained model for inference: its sparse linear layers stored and computed sparsely."""

from topkast_func.inference.convert import sparse_module
from topkast_func.inference.linear import SparseLinear

__all__ = ["SparseLinear", "sparse_module"]
