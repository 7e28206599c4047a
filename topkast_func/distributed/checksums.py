"""Checksums of trees of tensors, and whether all ranks hold the same."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from topkast_func.distributed.ranks import Ranks
from topkast_func.places import PIECE
from topkast_func.types import Tensors

ONE_START = (
    "Ranks are to begin with one state (of one seed or file) and to move it by train_step alone"
)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> int:
    """Return Σ_i (2i + 1)·b_i mod 2⁶⁴ of the bits b_i of the entries, as integers.

    Any one entry that differs changes it, as an odd number has an inverse.

    Args:
        tensor: Any.

    Returns:
        The sum, int64.
    """
    return int(_checksum(tensor))


def check_same(ranks: Ranks, where: str, tree: Any, advice: str = ONE_START) -> list[int]:
    """Check that all ranks hold the same tensors, bit for bit.

    A tensor on the meta device is with other ranks.

    Args:
        ranks: The processes.
        where: Which rank this is, and where in the training, for the error.
        tree: A tree of tensors, of the same structure on all ranks.
        advice: What is to be done, for the error.

    Returns:
        The checksum of each.

    Raises:
        RuntimeError: They do not, or none has one of them; the same on every rank.
    """
    own = [_told(leaf) for leaf in tree_leaves(tree)]
    sums, has = ranks.gathered(torch.stack(own)).unbind(-1)
    first = has.argmax(0)
    agreed = sums.gather(0, first[None])[0]
    differs = (has == 1) & (sums != agreed) | (has.amax(0) == 0)
    if not differs.any():
        return agreed.tolist()
    rank, place = differs.nonzero()[0].tolist()
    paths = [keystr(path) for path, _ in tree_flatten_with_path(tree)[0]]
    count = int(differs[rank].sum())
    raise RuntimeError(
        f"{where}: rank {rank} holds another state than rank {int(first[place])}, in {count} of "
        f"its tensors, {paths[place]} the first. {advice}"
    )


class Rest:
    """Tensors that stay as they are until others take their place."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[weakref.ref[Tensor], Tensor]] = {}

    def checked(self, tensors: Tensors, where: str) -> Tensors:
        """Take note of tensors, and check those that were noted the last time.

        Args:
            tensors: By name; those on the meta device are with other ranks.
            where: Which rank this is, and where in the training, for the error.

        Returns:
            The checksum of each, int64, 0-d; in the place of those of other ranks they themselves.

        Raises:
            RuntimeError: One of them has changed.
        """
        sums = {n: tensor if tensor.is_meta else _checksum(tensor) for n, tensor in tensors.items()}
        own = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
        known = {n: before for n, (last, before) in self._known.items() if last() is own.get(n, 0)}
        if changed := [name for name, before in known.items() if before != sums[name]]:
            raise RuntimeError(
                f"{where}: θ of {changed}, which this rank owns, is not what it was when its sets "
                "were chosen: memory was written to. Begin again on all ranks, from a checkpoint"
            )
        self._known = {name: (weakref.ref(tensor), sums[name]) for name, tensor in own.items()}
        return sums


def _told(tensor: Tensor) -> Tensor:
    """Return the checksum of a tensor, and whether it is here."""
    if tensor.is_meta:
        return torch.zeros(2, dtype=torch.int64, device="cpu")
    return torch.stack([_checksum(tensor).cpu(), torch.ones((), dtype=torch.int64, device="cpu")])


def _checksum(tensor: Tensor) -> Tensor:
    tensor = tensor.int_repr() if tensor.is_quantized else tensor
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = real.detach().contiguous().flatten().view(INTEGERS[real.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    weights = 2 * torch.arange(min(PIECE, bits.numel()), device=bits.device) + 1
    for start in range(0, bits.numel(), PIECE):
        part = bits[start : start + PIECE].to(torch.int64)
        total += (part * weights[: part.numel()]).sum() + 2 * start * part.sum()
    return total
