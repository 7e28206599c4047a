"""Activations as tiles of the batch, features outermost within a tile."""

import torch
from torch import Tensor
from torch.nn import functional

VECTOR_BYTES = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
"""Bytes of a vector: what one register holds, or two of the narrow kind."""

TILE_BYTES = 512
"""Most bytes of a row of a tile: eight vectors of the widest kind."""


def pack(x: Tensor) -> Tensor:
    """Cut a batch into tiles of equal width, a multiple of a vector.

    Args:
        x: [batch, features].

    Returns:
        [tiles, features, width], padded with zeros.
    """
    batch, features = x.shape
    size = x.element_size()
    tiles = max(1, -(-batch * size // TILE_BYTES))
    lanes = VECTOR_BYTES // size
    width = max(1, -(-batch // (tiles * lanes))) * lanes
    if missing := tiles * width - batch:
        x = functional.pad(x, (0, 0, 0, missing))
    return x.reshape(tiles, width, features).transpose(1, 2).contiguous()


def unpack(tiles: Tensor, batch: int) -> Tensor:
    """Return tiles as a batch; inverse of `pack`.

    Args:
        tiles: [tiles, features, width].
        batch: Rows there were.

    Returns:
        [batch, features], contiguous: random numbers, of dropout for one, are drawn in the order
        of memory.
    """
    return tiles.transpose(1, 2).flatten(0, 1)[:batch].contiguous()
