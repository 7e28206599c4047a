"""A trained model for inference: its sparse linear layers stored and computed sparsely."""

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from topkast_func.checks import check_count
from topkast_func.kernels.inference import pays, product, supported
from topkast_func.kernels.pattern import BlockRows, block_of, flat
from topkast_func.model.alone import alone_with, check_uncompiled, uncompiled
from topkast_func.model.layers import stand_ins
from topkast_func.model.modules import ties
from topkast_func.report.export import bsr, csr
from topkast_func.training.agreement import check_tensors
from topkast_func.training.state import TrainState, alpha_in, masks_of


class SparseLinear(nn.Module):
    """A linear layer for inference, whose weight is stored as CSR or BSR, in three plain tensors.

    They are those of `torch.sparse_csr_tensor` and `torch.sparse_bsr_tensor`, so that
    ``torch.sparse_csr_tensor(layer.crow_indices, layer.col_indices, layer.values)`` is the weight;
    `scipy.sparse.csr_array` takes the same. The dense weight is put together, at each call, where
    an input requires a gradient, off the CPU, and in half precision.

    Args:
        weight: The weight, [out_features, in_features], of layout CSR or BSR.
        bias: [out_features], or None.

    Attributes:
        values: Stored values, [stored], or [blocks, r, c].
        crow_indices: Where each row (of blocks) starts, int32, [rows + 1].
        col_indices: Column (of blocks) of each, int32, [stored].
        bias: [out_features], or None.
        in_features: Columns of the weight.
        out_features: Rows of the weight.
    """

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("values", weight.values().detach().clone())
        self.register_buffer("crow_indices", weight.crow_indices().int())
        self.register_buffer("col_indices", weight.col_indices().int())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The weight, dense, [out_features, in_features]."""
        shape = (self.out_features, self.in_features)
        places = flat(BlockRows(self.crow_indices, self.col_indices), block_of(self.values), shape)
        entries = self.values.new_zeros(self.out_features * self.in_features)
        dense: Tensor = entries.index_put((places,), self.values).view(shape)
        return dense

    def forward(self, input: Tensor) -> Tensor:
        """Return what `torch.nn.Linear` returns.

        Args:
            input: [..., in_features], of the dtype of the values. Under autocast it is cast to
                that, and float32 that is returned to the dtype of autocast.

        Returns:
            [..., out_features].

        Raises:
            TypeError: The dtype is another one.
            ValueError: There is another number of features.
        """
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"inputs of shape {tuple(input.shape)} do not fit a layer of "
                f"in_features={self.in_features}"
            )
        autocast = torch.is_autocast_enabled(input.device.type)
        x = input.to(self.values.dtype) if autocast else input
        if x.dtype != self.values.dtype:
            raise TypeError(f"inputs are {x.dtype}, the weight is {self.values.dtype}")
        differentiated = torch.is_grad_enabled() and x.requires_grad
        if differentiated or not supported(x.dtype, x.device.type):
            return functional.linear(x, self.weight, self.bias)
        rows = x if x.ndim == 2 else x.reshape(-1, self.in_features)
        index = self.crow_indices, self.col_indices
        y: Tensor = product(rows, self.values, *index, self.out_features)
        y = y if self.bias is None else y + self.bias
        y = y if x.ndim == 2 else y.reshape(*input.shape[:-1], self.out_features)
        cast = autocast and y.dtype == torch.float32
        return y.to(torch.get_autocast_dtype(input.device.type)) if cast else y

    def extra_repr(self) -> str:
        """Return the sizes, as `torch.nn.Linear` does, and how dense the weight is."""
        density = self.values.numel() / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, density={density:.1%}"
        )


def sparse_module(state: TrainState, model: nn.Module, batch_size: int = 64) -> nn.Module:
    """Make a module for inference, with α for weights, in evaluation mode.

    Its linear layers are `SparseLinear` where a cost model says that this is faster than a dense
    layer, and takes less memory; all else is as in ``model``. It has no parameter that requires a
    gradient. `torch.compile` and `torch.export` take it; what was exported needs
    ``import topkast_func`` before it is loaded.

    Args:
        state: The state.
        model: The module it was made of; it is not changed.
        batch_size: Rows of activations that a layer sees at a time, at least 1: for a sequence
            model batch times length. The cost model reads it, and any number can be given later.

    Returns:
        A module of its own, which shares no memory with the state or the model.

    Raises:
        TypeError: ``model`` is no module, or ``batch_size`` no integer.
        ValueError: The state is of another model, ``batch_size`` is below 1, or a part of the
            model is compiled.

    Example:
        >>> from topkast_func import TopKastConfig, init_state, sgd
        >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2))
        >>> config = TopKastConfig(forward_sparsity=0.9, keep_dense="2.*")
        >>> sparse_module(init_state(model, config, sgd(lr=0.1)), model)
        Sequential(
          (0): SparseLinear(in_features=512, out_features=512, bias=True, density=10.0%)
          (1): ReLU()
          (2): Linear(in_features=512, out_features=2, bias=True)
        )
    """
    batch = check_count("batch_size", batch_size, 1)
    model = uncompiled(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_uncompiled(model)
    return alone_with(model, partial(_sparse_module, state, model, batch))


def _sparse_module(state: TrainState, model: nn.Module, batch: int) -> nn.Module:
    check_tensors(state, model)
    tensors, values = alpha_in(state), state.weights.values()
    sparse = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
    sparse.load_state_dict(tensors, strict=False)
    masks, tied = masks_of(state), {*ties(sparse).values()}
    linear = [part for part in stand_ins(sparse) if isinstance(part.layer, nn.Linear)]
    for layer, name in [(part.layer, part.products[0].name) for part in linear]:
        if name not in masks or name in tied:
            continue
        alpha, mask = tensors[name].detach(), masks[name].forward
        stored = int(mask.sum())
        if pays(
            (layer.out_features, layer.in_features), stored, batch, alpha.dtype, alpha.device.type
        ):
            block = block_of(values[name])
            matrix = csr(alpha, mask) if block == (1, 1) else bsr(block, alpha, mask)
            sparse = _replaced(sparse, layer, SparseLinear(matrix, layer.bias))
    return _without_fused_layers(sparse)


def _replaced(model: nn.Module, layer: nn.Module, by: nn.Module) -> nn.Module:
    """Put a layer in the place of another, wherever that is reached; return the model."""
    for module in model.modules():
        module._modules.update({key: by for key, part in module._modules.items() if part is layer})
    return by if model is layer else model


def _without_fused_layers(model: nn.Module) -> nn.Module:
    """Let transformer layers call their linear layers, whose weights they would read themselves."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
    return model
