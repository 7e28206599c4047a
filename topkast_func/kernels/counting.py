"""A counting sort by columns, which takes no memory beside what it returns."""

from functools import cache

import torch
from torch import Tensor

from topkast_func.kernels.integers import Integer
from topkast_func.kernels.llvm import Kernel
from topkast_func.kernels.vectors import Tile
from topkast_func.places import PIECE


def by_columns(places: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return what `columns.by_columns` does, of places on the CPU."""
    length, parts = len(places), torch.get_num_threads()
    counts = torch.zeros(width, parts, dtype=torch.int64, device="cpu")
    for part in range(parts):
        own = places[length * part // parts : length * (part + 1) // parts]
        for piece in own.split(PIECE):
            counts[:, part] += torch.bincount(piece % width, minlength=width)
    firsts = counts.view(-1).cumsum(0).view_as(counts) - counts
    order, turned = torch.empty_like(places), torch.empty_like(places)
    _kernel()(places, length, height, width, firsts.T.contiguous(), order, turned, parts=parts)
    return order, turned


@cache
def _kernel() -> Kernel:
    """Return the kernel; it counts up where the next entry of each part and column goes."""

    def emit(
        tile: Tile,
        part: Integer,
        parts: Integer,
        places: Integer,
        length: Integer,
        height: Integer,
        width: Integer,
        firsts: Integer,
        order: Integer,
        turned: Integer,
    ) -> None:
        own = firsts + part * width * 8
        with tile.loop(length * part // parts, length * (part + 1) // parts) as i:
            place = tile.index(places, i)
            column = place % width
            target = tile.unsigned(own, column, 8)
            tile.store_integer(target + 1, own, column, 8)
            tile.store_integer(i, order, target, 4)
            tile.store_integer(column * height + place // width, turned, target, 4)

    return Kernel(emit, torch.float32)
