"""Bits that a compiled graph reads, compared at each run with those its index was made of."""

import torch
from torch import Tensor

from topkast_func.kernels.library import define
from topkast_func.kernels.soundness import Sound

_COMPARED = Sound()
"""Bits off the CPU, where to compare is to wait, and what they were compared with."""

_EXPORTS = getattr(torch.compiler, "is_exporting", bool)  # torch 2.6 has none


def in_a_graph() -> bool:
    """Return whether Dynamo traces what is to run again in this process."""
    return torch.compiler.is_dynamo_compiling() and not _EXPORTS()


def agreed(sets: Tensor, content: Tensor, exact: bool) -> Tensor:
    """Return 0, which a compiled graph adds to whatever it may read if the bits are as they were.

    Args:
        sets: 1_A and 1_B in bits, uint8, [2, ⌈n/8⌉].
        content: What they were when they were looked at, the same.
        exact: Whether they must still be so; else they may be other sets of these sizes.

    Returns:
        0, uint8, 0-d.

    Raises:
        RuntimeError: They are not.
    """
    found: Tensor = _AGREED(sets, content, exact)
    return found


def _agreed(sets: Tensor, content: Tensor, exact: bool) -> Tensor:
    waits = sets.device.type != "cpu" and not sets.is_inference()
    if not waits or not _COMPARED.knows((content, sets), exact):
        if not torch.equal(sets, content) and (exact or _sizes(sets) != _sizes(content)):
            raise RuntimeError(
                f"a buffer of sets, <name>_sets, of shape {tuple(sets.shape)}, has been written to "
                "since a compiled model last looked at it, by a broadcast, an average or copy_: "
                "run the module itself once, without torch.compile, and go on; no graph is made "
                "anew"
            )
        if waits:
            _COMPARED.add((content, sets), exact)
    return sets.new_zeros(())


def _sizes(sets: Tensor) -> list[int]:
    """Return |A|, |B| and |A ∩ B|."""
    both = torch.cat((sets, sets[:1] & sets[1:]))
    sizes: list[int] = torch.stack([both >> i & 1 for i in range(8)]).sum((0, 2)).tolist()
    return sizes


def _like(sets: Tensor, content: Tensor, exact: bool) -> Tensor:
    return sets.new_empty(())


_AGREED = define(
    "agreed(Tensor sets, Tensor content, bool exact) -> Tensor", _agreed, _like, waits=True
)
