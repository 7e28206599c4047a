"""The seed's linear layer, and its siblings for convolutions and embeddings."""

from typing import Any

import torch
from torch import nn

from topkast_func.checks import check_count
from topkast_func.facade.sparse_linear import SparseLinear
from topkast_func.facade.topkast_layer import TopKastLayer, check_sparsities
from topkast_func.kernels.engines import EngineName, check_engine


class TopKastLinear(TopKastLayer, SparseLinear, nn.Linear):
    """`torch.nn.Linear` with a sparse weight: y = x αᵀ + b.

    Where that is faster, sparse kernels compute it, with A alone in the products.

    Args:
        in_features: Size of an input, at least 1.
        out_features: Size of an output, at least 1.
        p_forward: Forward sparsity 1 − D, fraction in [0, 1).
        p_backward: Backward sparsity 1 − (D + M), fraction in [0, p_forward].
        bias: Whether to add a trained bias.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.
        engine: Who computes the products: "dense" for torch itself with all of α, "numba",
            "triton", "reference" or "torch_sparse"; "auto" for the fastest that supports dtype and
            device.

    Raises:
        ImportError: The engine asked for is not installed.
        TypeError: A size or sparsity is no number, or the engine does not support the dtype
            or device.
        ValueError: A size or sparsity is out of range, or there is no such engine.

    Departures:
        Values of B∖A stay in θ, where the seed holds zeros beside those of A; the forward pass
        does not see them. Inputs may have any number of leading dimensions, and get a gradient
        in evaluation mode too.

    Example:
        >>> layer = TopKastLinear(10, 16, p_forward=0.6, p_backward=0.4)
        >>> layer(torch.zeros(3, 10)).shape, layer.weight.shape, len(layer.active_fwd_weights)
        (torch.Size([3, 16]), torch.Size([16, 10]), 96)
    """

    _plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        p_forward: float,
        p_backward: float,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        engine: EngineName = "auto",
    ) -> None:
        check_count("in_features", in_features, 1)
        check_count("out_features", out_features, 1)
        check_sparsities(p_forward, p_backward)
        check_engine(engine)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._start(p_forward, p_backward, engine)


class _Convolution(TopKastLayer):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        p_forward: float,
        p_backward: float,
        **options: Any,
    ) -> None:
        check_sparsities(p_forward, p_backward)
        super().__init__(in_channels, out_channels, kernel_size, **options)
        self._start(p_forward, p_backward)


class TopKastConv1d(_Convolution, nn.Conv1d):
    """`torch.nn.Conv1d` with a sparse weight.

    Args:
        in_channels: Channels of an input.
        out_channels: Channels of an output.
        kernel_size: Size of the kernel.
        p_forward: Forward sparsity 1 − D, fraction in [0, 1).
        p_backward: Backward sparsity 1 − (D + M), fraction in [0, p_forward].
        **options: Those of `torch.nn.Conv1d`.

    Raises:
        TypeError: A sparsity is no number.
        ValueError: A sparsity is out of range.
    """

    _plain = nn.Conv1d


class TopKastConv2d(_Convolution, nn.Conv2d):
    """`torch.nn.Conv2d` with a sparse weight; see `TopKastConv1d`."""

    _plain = nn.Conv2d


class TopKastConv3d(_Convolution, nn.Conv3d):
    """`torch.nn.Conv3d` with a sparse weight; see `TopKastConv1d`."""

    _plain = nn.Conv3d


class TopKastEmbedding(TopKastLayer, nn.Embedding):
    """`torch.nn.Embedding` with a sparse weight.

    Args:
        num_embeddings: Rows of the table.
        embedding_dim: Size of an embedding.
        p_forward: Forward sparsity 1 − D, fraction in [0, 1).
        p_backward: Backward sparsity 1 − (D + M), fraction in [0, p_forward].
        **options: Those of `torch.nn.Embedding`.

    Raises:
        TypeError: A sparsity is no number.
        ValueError: A sparsity is out of range.
    """

    _plain = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        p_forward: float,
        p_backward: float,
        **options: Any,
    ) -> None:
        check_sparsities(p_forward, p_backward)
        super().__init__(num_embeddings, embedding_dim, **options)
        self._start(p_forward, p_backward)
