"""Layers of other libraries that take the place of `nn.Linear` in a network."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from topkast_func import Masks

onednn = torch.ops.mkldnn._linear_pointwise


def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x·weightᵀ through oneDNN, whatever torch would have chosen.

    Args:
        x: [..., in], strided in any way.
        weight: [out, in], strided in any way.

    Returns:
        [..., out].
    """
    product: Tensor = onednn(x, weight, None, "none", [], "")
    return product


class _OneDNN(torch.autograd.Function):
    """The three products of a linear layer, each through oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (g,), (x, weight) = grads, ctx.saved_tensors  # type: ignore[attr-defined]
        flat = g.flatten(0, -2), x.flatten(0, -2)
        return onednn_product(g, weight.t()), onednn_product(flat[0].t(), flat[1].t())


class OneDNNLinear(nn.Module):
    """A linear layer whose products all run in oneDNN.

    Args:
        linear: The layer in whose place it is put.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        product: Tensor = _OneDNN.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return product + self.bias


class TorchSparseLinear(nn.Module):
    """A linear layer as torch-sparse is used where B is to learn: coordinates and `spmm`.

    The coordinates are those of B. Entries of B∖A hold zero, so that the product is that of A
    and autograd reaches all of B.

    Args:
        linear: The layer in whose place it is put.
        masks: Its sets.
    """

    def __init__(self, linear: nn.Linear, masks: Masks) -> None:
        super().__init__()
        self.spmm = import_module("torch_sparse").spmm
        alpha = linear.weight.detach() * masks.forward
        self.values = nn.Parameter(alpha[masks.backward])
        self.bias = linear.bias
        self.shape = linear.weight.shape
        self.register_buffer("index", masks.backward.nonzero().t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, in] to [batch, out]."""
        product: Tensor = self.spmm(self.index, self.values, *self.shape, x.t())
        return product.t() + self.bias


def sparselab_linear(linear: nn.Linear, sparsity: float) -> nn.Module:
    """Return SparseLab's layer of the same shape; it draws its own weights.

    Args:
        linear: The layer in whose place it is put.
        sparsity: Fraction of zeros; what it computes with is what it trains.

    Returns:
        The layer.
    """
    layer: nn.Module = import_module("sparselab").SparseLinear(
        linear.in_features, linear.out_features, sparsity=sparsity
    )
    return layer
