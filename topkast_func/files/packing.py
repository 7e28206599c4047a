"""Sets on disk: as bits, or as positions where those take fewer bytes."""

import numpy as np
import torch
from torch import Tensor

from topkast_func.types import Masks


def packed_sets(name: str, masks: Masks) -> Masks:
    """Pack B among the entries of a weight, and A among the entries of B; see `packed`.

    Args:
        name: Name of the weight, for errors.
        masks: 1_A and 1_B.

    Returns:
        A and B, packed.

    Raises:
        ValueError: A is not within B.
    """
    forward, backward = masks
    if (forward & ~backward).any():
        raise ValueError(f"A of {name!r} is not within B")
    return Masks(packed(forward[backward].cpu()), packed(backward.flatten().cpu()))


def unpacked_sets(name: str, stored: Masks, shape: torch.Size) -> Masks:
    """Undo `packed_sets`.

    Args:
        name: Name of the weight, for errors.
        stored: A and B, packed, on the CPU.
        shape: Shape of the weight.

    Returns:
        1_A and 1_B.

    Raises:
        ValueError: They are not what `packed_sets` makes of sets of that shape.
    """
    backward = unpacked(f"backward/{name}", stored.backward, shape.numel())
    within = unpacked(f"forward/{name}", stored.forward, int(backward.count_nonzero()))
    forward = torch.zeros_like(backward)
    forward[backward] = within
    return Masks(forward.view(shape), backward.view(shape))


def packed(flags: Tensor) -> Tensor:
    """Pack flags into the fewer bytes of two forms.

    Bits are uint8, [⌈flags / 8⌉], the first flag lowest in its byte and those beyond the last 0.
    Positions are those of the flags that are set, ascending, int32, or int64 where there are 2³¹
    flags or more. Bits where both take as many bytes.

    Args:
        flags: bool, [flags], on the CPU.

    Returns:
        Bits or positions.
    """
    bits = np.packbits(flags.numpy(), bitorder="little")
    dtype = _dtype_of_positions(len(flags))
    if int(flags.count_nonzero()) * dtype.itemsize < len(bits):
        return flags.nonzero().squeeze(1).to(dtype)
    return torch.from_numpy(bits)


def unpacked(name: str, stored: Tensor, size: int) -> Tensor:
    """Undo `packed`.

    Args:
        name: What is packed, for errors.
        stored: Bits or positions, on the CPU.
        size: How many flags there are.

    Returns:
        bool, [flags].

    Raises:
        ValueError: They are not what `packed` makes of so many flags.
    """
    if stored.dtype == torch.uint8 and stored.shape == (-(-size // 8),):
        bits = torch.from_numpy(np.unpackbits(stored.numpy(), bitorder="little")).bool()
        if bits[size:].any():
            raise ValueError(f"{name} has a bit beyond the {size} that there are")
        return bits[:size]
    if stored.dtype != _dtype_of_positions(size) or stored.ndim != 1:
        form = f"{stored.dtype} of shape {tuple(stored.shape)}"
        raise ValueError(f"{name} is {form}, which is no set among {size} entries")
    ascending = (stored[1:] > stored[:-1]).all()
    if len(stored) and not (ascending and stored[0] >= 0 and stored[-1] < size):
        raise ValueError(f"{name} has positions that do not ascend within {size} entries")
    return torch.zeros(size, dtype=torch.bool, device="cpu").index_fill(0, stored.long(), True)


def _dtype_of_positions(size: int) -> torch.dtype:
    return torch.int32 if size < 2**31 else torch.int64
