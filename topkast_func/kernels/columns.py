"""Matrices by columns: the order of their entries, and where these stand in the transpose."""

from importlib import import_module

from torch import Tensor

from topkast_func.kernels.engines import installed
from topkast_func.places import order_of
from topkast_func.reading import readable

MANY = 2**20
"""Entries from which on a counting sort is worth the kernel that is made for it."""


def by_columns(places: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the order of places by columns, and where they stand in the transpose.

    Args:
        places: Flat indices into a matrix, int32, [n], ascending.
        height: Rows of it.
        width: Columns of it.

    Returns:
        Which of the places comes when, and flat indices into the transpose, ascending; int32, [n].
    """
    here = places.device.type == "cpu" and readable(places)
    if here and places.numel() >= MANY and installed("numba"):
        counting = import_module("topkast_func.kernels.counting")
        found: tuple[Tensor, Tensor] = counting.by_columns(places, height, width)
        return found
    column = places % width
    short = width <= 2**16  # 16 bits are sorted in linear time
    order = order_of(column.sub(2**15).short() if short else column).to(places.dtype)
    return order, column.mul_(height).add_(places // width).index_select(0, order)
