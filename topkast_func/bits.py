"""Masks as bits: eight entries a byte, the first lowest, by operations that can be traced."""

import torch
from torch import Tensor
from torch.nn import functional


def packed(mask: Tensor) -> Tensor:
    """Pack a mask.

    Args:
        mask: bool, any shape, n entries.

    Returns:
        uint8, [⌈n/8⌉], as `numpy.packbits` with ``bitorder="little"``: entry i of the flat mask is
        bit i mod 8 of byte ⌊i/8⌋; bits beyond the last entry are 0.

    Example:
        >>> packed(torch.tensor([[True, False, True], [False, False, False]])).tolist()
        [5]
    """
    bits = functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return torch.stack([bits[:, i] << i for i in range(8)]).sum(0, dtype=torch.uint8)


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """Unpack a mask; inverse of `packed`.

    Args:
        bits: uint8, [⌈n/8⌉].
        shape: Shape of the mask, n entries.

    Returns:
        The mask, bool.
    """
    entries = torch.stack([bits >> i & 1 for i in range(8)], -1).flatten()
    return entries[: shape.numel()].view(shape).bool()
