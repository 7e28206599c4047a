"""What the three products of a layer cost on each engine, as estimated."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from topkast_func.kernels.tiles import VECTOR_BYTES


class Layer(NamedTuple):
    """What the choice of an engine depends on.

    Attributes:
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        forward: Entries in A.
        backward: Entries in B.
        block_shape: (r, c) of a block.
        batch: Rows of activations that the layer sees at a time.
        dtype: Dtype of values and activations.
        device: Type of the device.
        rows: Of a convolution, how many numbers of its input lie beside an output: channels, and
            those of each phase of a stride; 0 for a linear layer.
        device_index: Which of the devices of its type; None for the current one.
    """

    out_features: int
    in_features: int
    forward: int
    backward: int
    block_shape: tuple[int, int]
    batch: int
    dtype: torch.dtype
    device: str
    rows: int = 0
    device_index: int | None = None


def channels_of(shape: Sequence[int]) -> int:
    """Return the `Layer.rows` of a weight: channels of a kernel, without strides; 0 of a matrix."""
    return shape[1] if len(shape) > 2 else 0


def cost(name: str, layer: Layer) -> float:
    """Estimate the time of the three products of a layer, in nanoseconds.

    Only the ratio of two engines on one device matters. On a CPU the constants are fits to
    benchmarks/results, of two fast cores. On a GPU they are projected from published rates of an
    H100, and measured by nobody yet.

    Args:
        name: "numba", "triton" or "dense".
        layer: The layer.

    Returns:
        The estimate.
    """
    if layer.device != "cpu":
        return _projected(name, layer)
    entries = layer.out_features * layer.in_features
    activations = layer.batch * (layer.out_features + layer.in_features)
    if name == "dense":
        moved = 2 * layer.forward + layer.backward
        return 250e3 + 3 * entries * layer.batch / _dense_speed(layer) + 8 * moved
    lanes, faster = (32, 1.6) if layer.dtype == torch.bfloat16 else (16, 1)
    products = (2 * layer.forward + layer.backward) * (-(-layer.batch // lanes) * lanes) / faster
    if layer.rows:
        return 45e3 + products / 40 + 2.5 * layer.batch * (layer.out_features + layer.rows)
    return 45e3 + products / _speed(layer.block_shape) + 0.3 * activations / faster


def _dense_speed(layer: Layer) -> float:
    """Return multiplications per nanosecond of dense products.

    Those in bfloat16 take AVX512_BF16 where that is, and convolutions the widest vectors there are.
    """
    if layer.dtype == torch.bfloat16:
        return 285 if torch.cpu._is_avx512_bf16_supported() else 50
    return 135 if layer.rows and VECTOR_BYTES == 64 else 95


def _projected(name: str, layer: Layer) -> float:
    """Estimate the time on a GPU: launches, multiplications at a rate, and bytes that are moved."""
    entries = layer.out_features * layer.in_features
    half = layer.dtype in (torch.float16, torch.bfloat16)
    rate = 300e3 if half else 25e3  # multiplications per nanosecond, dense
    if name == "dense":
        moved = (2 * entries + 8 * (layer.forward + layer.backward)) * layer.dtype.itemsize
        return 60e3 + 3 * entries * layer.batch / rate + moved / 2e3
    side = min(*layer.block_shape, 128)
    reached = side / (side + 64)  # a fifth of that at 16, half at 64, two thirds at 128
    return 40e3 + (2 * layer.forward + layer.backward) * layer.batch / (rate * reached)


def _speed(block_shape: tuple[int, int]) -> float:
    """Return multiplications per nanosecond; blocks reuse what they load, on both sides."""
    rows, columns = (min(n, 4) for n in block_shape)
    return 90 * rows * columns / (rows * columns + 1)
