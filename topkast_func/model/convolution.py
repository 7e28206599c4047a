"""`torch.nn.Conv1d` and `Conv2d` on the kernels."""

from typing import Any

import torch
from torch import Tensor, nn

from topkast_func.kernels.convolution import sparse_convolution
from topkast_func.kernels.engines import EngineName
from topkast_func.kernels.pattern import Pattern
from topkast_func.kernels.shifted import Convolution
from topkast_func.model.stand_in import StandIn, calls_its_own, computes_as

LAYERS = (nn.Conv1d, nn.Conv2d)


class ConvolutionStandIn(StandIn):
    """Stands in for a convolution without groups; where dense products are faster, α is used."""

    @staticmethod
    def is_of(kind: type) -> bool:
        """Return whether layers of a class compute as this does."""
        return computes_as(kind, *LAYERS)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Return whether this computes what the layer does, as that is now."""
        return super().fits(layer) and convolution_of(layer) is not None

    def compute(self, input: Tensor) -> Tensor:
        """Return what the layer returns."""
        layer, (product,) = self.layer, self.products
        y, bound = None, product.bound
        if bound is not None and layer.weight is bound.alpha:
            y = convolved(layer, input, bound.values, bound.pattern, product.engine)
        if y is None:
            found: Tensor = layer._conv_forward(input, layer.weight, layer.bias)
            return found
        return y


def convolved(
    layer: Any, input: Tensor, values: Tensor, pattern: Pattern, engine: EngineName
) -> Tensor | None:
    """Return what a convolution does, on the kernels.

    Args:
        layer: The convolution.
        input: Its input.
        values: θ on B, A first.
        pattern: The sets.
        engine: Who computes.

    Returns:
        Its output; None where α is to be used, see `sparse_convolution`.
    """
    described = convolution_of(layer)
    if described is None or not _is_batch(input, layer):
        return None
    images = input if isinstance(layer, nn.Conv2d) else input.unsqueeze(2)
    y = sparse_convolution(images, values, pattern, layer.out_channels, described, engine)
    if y is None:
        return None
    y = y if layer.bias is None else y + layer.bias[:, None, None]
    return y if isinstance(layer, nn.Conv2d) else y.squeeze(2)


def convolution_of(layer: Any) -> Convolution | None:
    """Describe a convolution, of one axis as of images of height 1; None of one that does more."""
    if layer.groups != 1 or layer.padding_mode != "zeros" or calls_its_own(layer):
        return None
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    reach = [(taps - 1) * step for taps, step in zip(kernel, dilation, strict=True)]
    if layer.padding == "same" and any(n % 2 for n in reach):
        return None
    named = {"same": tuple(n // 2 for n in reach), "valid": (0,) * len(reach)}
    padding = named[layer.padding] if isinstance(layer.padding, str) else layer.padding
    if any(pad > n for pad, n in zip(padding, reach, strict=True)):
        return None
    if len(reach) == 1:
        return Convolution((1, *kernel), (1, *stride), (0, *padding), (1, *dilation))
    return Convolution(kernel, stride, padding, dilation)


def _is_batch(input: Tensor, layer: Any) -> bool:
    """Return whether an input is a batch, with as many channels as there are, and no autocast."""
    return (
        input.ndim == 2 + len(layer.kernel_size)
        and input.shape[1] == layer.in_channels
        and not torch.is_autocast_enabled(input.device.type)
    )
