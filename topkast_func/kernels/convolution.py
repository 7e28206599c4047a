"""A sparse convolution as a function, right wherever `sparse_linear` is."""

import math

from torch import Tensor

from topkast_func.kernels.engines import EngineName
from topkast_func.kernels.linear import chosen
from topkast_func.kernels.operators import product
from topkast_func.kernels.pattern import Pattern, flattened
from topkast_func.kernels.shifted import Convolution, planes
from topkast_func.types import changed


def sparse_convolution(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    out_channels: int,
    layer: Convolution,
    engine: EngineName = "auto",
) -> Tensor | None:
    """Return the convolution of images with α, computed with A; the gradient of values reaches B.

    Args:
        x: [batch, channels, height, width].
        values: θ on B, A first: [|B|].
        pattern: The sets, of the matrix [out_channels, channels·taps].
        out_channels: Channels of the outputs.
        layer: The convolution; its padding is at most its reach.
        engine: Who computes; "auto" for the fastest.

    Returns:
        [batch, out_channels, height, width]; None where that is left to dense products: they are
        faster, another engine was asked for, or dtype, device or sizes are none of the kernels.
    """
    (height, width), (down, across) = layer.kernel, layer.stride
    if height == width == 1:  # a single tap reads none of the pixels between
        x, layer = x[:, :, ::down, ::across], changed(layer, stride=(1, 1))
    laid = planes(x, layer) if x.dtype == values.dtype else None
    if laid is None:
        return None
    rows = x.shape[1] * math.prod(layer.stride)
    columns = x.shape[1] * math.prod(layer.kernel)
    batch = laid.batch * math.prod(laid.outputs)
    if chosen(engine, values, pattern, (out_channels, columns), batch, rows) != "numba":
        return None
    index = [*flattened(pattern), laid.starts(x.shape[1], x.device)]
    y = product("shifted_cpu", values, laid.pack(x), index, out_channels, laid.lead, None)
    return laid.unpack(y)
