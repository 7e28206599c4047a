"""Products with the densified weight: what a sparse product must beat."""

import torch
from torch import Tensor
from torch.nn import functional

from topkast_func.kernels.pattern import Pattern, block_of, flat, gathered


def forward(values: Tensor, x: Tensor, pattern: Pattern, features: int) -> Tensor:
    """Return x·W_Aᵀ of activations [batch, in]."""
    return _product(x, _densified(values, pattern, (features, x.shape[1])))


def input_gradient(values: Tensor, g: Tensor, pattern: Pattern, features: int) -> Tensor:
    """Return g·W_A of gradients [batch, out]."""
    return _product(g, _densified(values, pattern, (g.shape[1], features)).t())


def weight_gradient(g: Tensor, x: Tensor, pattern: Pattern, values: Tensor) -> Tensor:
    """Return gᵀ·x sampled on B, in the order and shape of ``values``."""
    shape, block = (g.shape[1], x.shape[1]), block_of(values)
    gradient, narrow = _product(g.t(), x.t()), g.device.type != "cpu"
    active = gathered(gradient, flat(pattern.forward, block, shape, narrow))
    places = flat(pattern.exploring, block, shape, narrow)
    last = gradient.numel() - 1
    exploring = gathered(gradient, places.clamp(max=last))
    return torch.cat((active, torch.where(places <= last, exploring, 0.0)))


def _densified(values: Tensor, pattern: Pattern, shape: tuple[int, int]) -> Tensor:
    places = flat(pattern.forward, block_of(values), shape, values.device.type != "cpu")
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
