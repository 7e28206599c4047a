"""What lies outside a set is put back, on any device."""

import torch
from torch import Tensor

from topkast_func.bits import unpacked
from topkast_func.reading import dispatches


def keep_within(bits: Tensor, tensor: Tensor, elsewhere: Tensor | None) -> None:
    """Leave the entries that bits mark, and put back what others were.

    Args:
        bits: uint8, [⌈n/8⌉], as `packed` returns them.
        tensor: n entries; it is written to.
        elsewhere: What the others are to be, of the same kind; None for 0.
    """
    fast = tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)
    if fast and tensor.is_contiguous() and not dispatches(tensor):
        from topkast_func.kernels import within

        within.keep_within(bits, tensor, elsewhere)
    else:
        others = 0.0 if elsewhere is None else elsewhere
        tensor.copy_(torch.where(unpacked(bits, tensor.shape), tensor, others))
