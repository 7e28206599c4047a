"""A convolution of one pixel for inference: a linear layer over its channels."""

from typing import Any

import torch
from torch import Tensor, nn

from topkast_func.inference.linear import SparseLinear
from topkast_func.inference.replaceable import replaceable
from topkast_func.kernels.linear import check_strided_inputs

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
"""How torch calls channels that are the last axis in memory, by the axes of an image."""
AXES = ("depth", "height", "width")
"""Of an image; one of fewer has the last ones."""


class SparsePointwise(nn.Module):
    """Computes what a convolution with kernels of one pixel does.

    Args:
        layer: The convolution.
        linear: What multiplies the channels.

    Attributes:
        linear: The same.
        stride: Its step along each axis of the image.
    """

    def __init__(self, layer: Any, linear: SparseLinear) -> None:
        super().__init__()
        self.linear = linear
        self.stride: tuple[int, ...] = layer.stride

    @property
    def weight(self) -> Tensor:
        """The weight, dense, [out_channels, in_channels, 1, …]."""
        dense = self.linear.weight
        return dense.view(*dense.shape, *[1] * len(self.stride))

    @property
    def bias(self) -> Tensor | None:
        """[out_channels], or None."""
        return self.linear.bias

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Return whether a layer is such a convolution."""
        return (
            isinstance(layer, CONVOLUTIONS)
            and replaceable(layer, CONVOLUTIONS)
            and layer.weight.shape[2:].numel() == 1
            and layer.groups == 1
            and not (isinstance(layer.padding, tuple) and any(layer.padding))
        )

    def forward(self, input: Tensor) -> Tensor:
        """Return what the convolution returns.

        Args:
            input: [batch, channels, …], or without batch.

        Returns:
            The same with out_channels, their axis the last in memory if it was before.

        Raises:
            TypeError: The dtype is another one, or the input no strided tensor.
            ValueError: There are more or fewer axes, or another number of channels.
        """
        check_strided_inputs(input)
        axes, in_channels = len(self.stride), self.linear.in_features
        if input.ndim not in (axes + 1, axes + 2) or input.shape[-1 - axes] != in_channels:
            taken = ", ".join(("batch", str(in_channels), *AXES[-axes:]))
            raise ValueError(
                f"inputs of shape {tuple(input.shape)} do not fit a convolution that takes "
                f"[{taken}], or that without batch"
            )
        channels, last = -1 - axes, _is_last(input, axes)
        for axis, step in enumerate(self.stride, channels + 1):
            input = input.movedim(axis, 0)[::step].movedim(0, axis)
        out: Tensor = self.linear(input.movedim(channels, -1))
        out = out.movedim(-1, channels)
        return out if last else out.contiguous()


def _is_last(input: Tensor, axes: int) -> bool:
    """Return whether the channels of a batch are the last axis in memory."""
    batched = axes in LAST and input.ndim == axes + 2 and not input.is_contiguous()
    return batched and input.is_contiguous(memory_format=LAST[axes])
