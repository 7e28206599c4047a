"""Products with the densified weight: what a sparse product must beat.

On a device the three of a layer share where the values of A stand, 4 bytes of each from the forward
to the backward pass: to find out moves 24 bytes of each.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from topkast_func.kernels.pattern import BlockRows, Pattern, block_of, flat
from topkast_func.places import gathered


class Flat(NamedTuple):
    """Two disjoint sets of a matrix, the one as `flat` counts it.

    Attributes:
        active: Where the entries of A stand in the flat matrix.
        exploring: B∖A.
    """

    active: Tensor
    exploring: BlockRows


def forward(values: Tensor, x: Tensor, sets: Pattern | Flat, features: int) -> Tensor:
    """Return x·W_Aᵀ of activations [batch, in]."""
    return _product(x, _densified(values, sets, (features, x.shape[1])))


def input_gradient(values: Tensor, g: Tensor, sets: Pattern | Flat, features: int) -> Tensor:
    """Return g·W_A of gradients [batch, out]."""
    return _product(g, _densified(values, sets, (g.shape[1], features)).t())


def weight_gradient(g: Tensor, x: Tensor, sets: Pattern | Flat, values: Tensor) -> Tensor:
    """Return gᵀ·x sampled on B, in the order and shape of ``values``."""
    shape, gradient = (g.shape[1], x.shape[1]), _product(g.t(), x.t())
    active, others = flat_sets(values, sets, shape)
    places = flat(others, block_of(values), shape, on_device(values))
    last = gradient.numel() - 1
    exploring = gathered(gradient, places.clamp(max=last))
    return torch.cat((gathered(gradient, active), torch.where(places <= last, exploring, 0.0)))


def on_device(values: Tensor) -> bool:
    """Return whether values are on a device other than the CPU, where bytes are time."""
    return values.device.type != "cpu"


def flat_sets(values: Tensor, sets: Pattern | Flat, shape: tuple[int, int]) -> Flat:
    """Return where the values of A stand in a matrix of this shape, in int32 on a device."""
    if isinstance(sets, Flat):
        return sets
    active = flat(sets.forward, block_of(values), shape, on_device(values))
    return Flat(active, sets.exploring)


def _densified(values: Tensor, sets: Pattern | Flat, shape: tuple[int, int]) -> Tensor:
    places = flat_sets(values, sets, shape).active
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
