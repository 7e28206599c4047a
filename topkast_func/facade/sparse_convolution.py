"""`torch.nn.Conv1d` and `Conv2d` with a sparse weight."""

from typing import Any

from torch import Tensor

from topkast_func.facade.sparse_layer import ForwardPass, SparseLayer
from topkast_func.facade.sparse_weight import weights_of
from topkast_func.model.convolution import convolved


class SparseConvolution(SparseLayer):
    """Mixed into `torch.nn.Conv1d` and `Conv2d`: kernels compute where that is faster."""

    def forward(self, input: Tensor) -> Any:
        """Compute with α, on the kernels or densely."""
        y = self._on_kernels(input)
        return super().forward(input) if y is None else y

    def _on_kernels(self, input: Tensor) -> Tensor | None:
        weight = weights_of(self).get("weight")
        derived = None if weight is None else weight.derived(self)
        if weight is None or derived is None or derived.kernel is None or weight.probe is not None:
            return None
        values, pattern = derived.kernel.values(weight.theta(self)), derived.kernel.pattern
        with ForwardPass():
            return convolved(self, input, values, pattern, weight.rule.engine)
