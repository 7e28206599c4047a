"""Masks of blocks, and of the entries of a weight that is made of them."""

import torch
from torch import Tensor


def blocks(mask: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """Return a mask over blocks, each as its first entry is.

    Args:
        mask: Mask over the entries of a weight.
        block_shape: (rows, columns) of a block, over the first two axes.

    Returns:
        The mask over blocks; inverse of `spread` where every block is in or out as a whole.
    """
    rows, columns = block_shape
    return mask if block_shape == (1, 1) else mask[::rows, ::columns]


def spread(mask: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """Spread a mask over blocks to the entries of a weight.

    Args:
        mask: Mask over blocks.
        block_shape: (rows, columns) of a block, over the first two axes.

    Returns:
        The mask over entries.
    """
    if block_shape == (1, 1):
        return mask
    rows, columns = block_shape
    return mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def is_of_blocks(mask: Tensor, block_shape: tuple[int, int]) -> bool:
    """Return whether a mask over entries has every block in or out as a whole."""
    if block_shape == (1, 1):
        return True
    return mask.ndim > 1 and torch.equal(spread(blocks(mask, block_shape), block_shape), mask)
