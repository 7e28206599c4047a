"""A convolution of one pixel for inference: a linear layer over its channels."""

from typing import Any

from torch import Tensor, nn

from topkast_func.inference.linear import SparseLinear
from topkast_func.inference.replaceable import replaceable

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
            The same with out_channels, their axis the last in memory.
        """
        channels = -1 - len(self.stride)
        for axis, step in enumerate(self.stride, channels + 1):
            input = input.movedim(axis, 0)[::step].movedim(0, axis)
        out: Tensor = self.linear(input.movedim(channels, -1))
        return out.movedim(-1, channels)
