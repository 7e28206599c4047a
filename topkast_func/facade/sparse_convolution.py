"""`torch.nn.Conv1d` and `Conv2d` with a sparse weight."""

from typing import Any

from torch import Tensor

from topkast_func.facade.sparse_layer import ForwardPass, SparseLayer
from topkast_func.facade.sparse_linear import multiplied_by
from topkast_func.model.convolution import convolved


class SparseConvolution(SparseLayer):
    """Mixed into `torch.nn.Conv1d` and `Conv2d`: kernels compute where that is faster."""

    def forward(self, input: Tensor) -> Any:
        """Compute with α, on the kernels or densely."""
        found = multiplied_by(self, "weight")
        with ForwardPass():
            y = None if found is None else convolved(self, input, *found)
        return super().forward(input) if y is None else y
