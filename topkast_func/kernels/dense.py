"""Products with the densified weight: what a sparse product must beat."""

import torch
from torch import Tensor
from torch.nn import functional

from topkast_func.kernels.pattern import Pattern, block_of, flat


def forward(values: Tensor, x: Tensor, pattern: Pattern, features: int) -> Tensor:
    """Return x·W_Aᵀ of activations [batch, in]."""
    return _product(x, _densified(values, pattern, (features, x.shape[1])))


def input_gradient(values: Tensor, g: Tensor, pattern: Pattern, features: int) -> Tensor:
    """Return g·W_A of gradients [batch, out]."""
    return _product(g, _densified(values, pattern, (g.shape[1], features)).t())


def weight_gradient(g: Tensor, x: Tensor, pattern: Pattern, values: Tensor) -> Tensor:
    """Return gᵀ·x sampled on B, in the order and shape of ``values``."""
    shape = (g.shape[1], x.shape[1])
    gradient = torch.cat((_product(g.t(), x.t()).flatten(), g.new_zeros(1)))
    block = block_of(values)
    return torch.cat([
        gradient[flat(part, block, shape)] for part in (pattern.forward, pattern.exploring)
    ])


def _densified(values: Tensor, pattern: Pattern, shape: tuple[int, int]) -> Tensor:
    places = flat(pattern.forward, block_of(values), shape)
    weight = values.new_zeros(shape)
    weight.view(-1)[places] = values[: places.shape[0]]
    return weight


def _product(x: Tensor, w: Tensor) -> Tensor:
    """Return x·wᵀ by the fastest dense product there is: oneDNN on a CPU, in float32."""
    in_onednn = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
    if in_onednn and torch.backends.mkldnn.is_available():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        return product.contiguous()
    return functional.linear(x, w)
