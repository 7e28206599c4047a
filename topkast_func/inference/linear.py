"""A linear layer for inference, whose weight is stored and computed sparsely."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from topkast_func.kernels.inference import check_bias, dense_matrix, product, supported
from topkast_func.kernels.linear import check_inputs

LAYOUTS = (torch.sparse_csr, torch.sparse_bsr)
MADE_BY = "tk.sparse_module makes such layers, and tk.to_sparse such matrices"


class SparseLinear(nn.Module):
    """A linear layer for inference, whose weight is stored as CSR or BSR, in three dense tensors.

    They are those of `torch.sparse_csr_tensor` and `torch.sparse_bsr_tensor`, so that
    ``torch.sparse_csr_tensor(layer.crow_indices, layer.col_indices, layer.values)`` is the weight;
    `scipy.sparse.csr_array` takes the same. The dense weight is put together, at each call, off the
    CPU and in half precision, and in a backward pass.

    Args:
        weight: The weight, [out_features, in_features], of layout CSR or BSR.
        bias: [out_features], or None.

    Attributes:
        values: Stored values, [stored], or [blocks, r, c], a parameter without a gradient.
        crow_indices: Where each row (of blocks) starts, int32, [rows + 1].
        col_indices: Column (of blocks) of each, int32, [stored].
        bias: [out_features], the same, or None.
        in_features: Columns of the weight.
        out_features: Rows of the weight.

    Raises:
        TypeError: The weight is none, or the bias is of another dtype.
        ValueError: The bias is of another size than the weight.
    """

    crow_indices: Tensor
    col_indices: Tensor

    @torch.inference_mode(False)
    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(weight, Tensor) or weight.layout not in LAYOUTS or weight.ndim != 2:
            kind = (weight.layout, weight.ndim) if isinstance(weight, Tensor) else type(weight)
            raise TypeError(f"weight must be a matrix of layout CSR or BSR, got {kind}: {MADE_BY}")
        self.out_features, self.in_features = weight.shape
        index = {"crow_indices": weight.crow_indices(), "col_indices": weight.col_indices()}
        for name, numbers in index.items():
            self.register_buffer(name, numbers.to(torch.int32, copy=True))
        self.values = _fixed(weight.values())
        if bias is not None:
            check_bias(bias, self.values, self.out_features)
        self.bias = None if bias is None else _fixed(bias)

    @property
    def weight(self) -> Tensor:
        """The weight, dense, [out_features, in_features]."""
        shape = (self.out_features, self.in_features)
        return dense_matrix(self.values, self.crow_indices, self.col_indices, shape)

    def forward(self, input: Tensor) -> Tensor:
        """Return what `torch.nn.Linear` returns.

        Args:
            input: [..., in_features], of the dtype of the values. Under autocast it is cast to
                that, and float32 that is returned to the dtype of autocast.

        Returns:
            [..., out_features].

        Raises:
            TypeError: The dtype is another one, or the input no strided tensor.
            ValueError: There is another number of features.
        """
        check_inputs(input, self.in_features)
        values, bias, device = self.values, self.bias, input.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        x = input.to(values.dtype) if autocast else input
        if x.dtype != values.dtype:
            raise TypeError(f"inputs are {x.dtype}, the weight is {values.dtype}")
        if not supported(x.dtype, device):
            return functional.linear(x, self.weight, bias)
        rows = x if x.ndim == 2 else x.reshape(-1, self.in_features)
        index = self.crow_indices, self.col_indices
        y: Tensor = product(rows, values, *index, bias, self.out_features)
        y = y if x.ndim == 2 else y.reshape(*input.shape[:-1], self.out_features)
        cast = autocast and y.dtype == torch.float32
        return y.to(torch.get_autocast_dtype(device)) if cast else y

    def extra_repr(self) -> str:
        """Return the sizes, as `torch.nn.Linear` does, and how dense the weight is."""
        density = self.values.numel() / max(1, self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, density={density:.1%}"
        )


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
