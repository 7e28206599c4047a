"""Where the values of B stand in θ, and what follows a weight when that changes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from topkast_func.kernels.pattern import (
    INDEX_LIMIT,
    Pattern,
    flat_in_bands,
    flattened,
    pattern_of,
)
from topkast_func.kernels.soundness import Sound
from topkast_func.model.alpha import split
from topkast_func.places import PIECE, places_apart
from topkast_func.reading import readable
from topkast_func.types import Masks


class Positions(NamedTuple):
    """The two disjoint sets of a weight that no kernel computes, as flat indices into θ.

    Attributes:
        forward: A, int64, [|A|], ascending.
        exploring: B∖A, int64, ascending; the number of entries of θ where a place is unused.
    """

    forward: Tensor
    exploring: Tensor

    @property
    def active_count(self) -> int:
        """How many of the values are those of A; they come first."""
        return self.forward.shape[0]

    @property
    def exploring_count(self) -> int:
        """How many places B∖A has, unused ones included."""
        return self.exploring.shape[0]

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """What `flat_index` follows from."""
        return self.forward, self.exploring

    def flat_index(self, block: tuple[int, int], shape: torch.Size) -> Tensor:
        """Return where the values stand in the flat θ; see `Pattern.flat_index`."""
        return torch.cat(self)


Index: TypeAlias = Pattern | Positions
"""A and B∖A of a weight: a pattern, of entries or blocks, where a kernel computes it."""

MADE = Sound()
"""Sets that were made here, with the block and shape that they were made of."""


def tensors_of(sets: Index | Masks) -> tuple[Tensor, ...]:
    """Return the tensors that sets consist of."""
    return flattened(sets) if isinstance(sets, Pattern) else tuple(sets)


def index_of(
    masks: Masks,
    block: tuple[int, int],
    sizes: tuple[int, int],
    by_kernel: bool,
    exploring: int | None = None,
) -> Index:
    """Return where the sets of a weight are.

    Args:
        masks: The sets.
        block: (r, c) of the blocks of a pattern.
        sizes: |A| and |B|, entries.
        by_kernel: Whether a kernel computes the weight, of which a pattern is made then.
        exploring: Places to keep for B∖A at the least; None for as many as it has.

    Returns:
        The pattern or the positions, on the device of the masks.
    """
    made: Index
    if by_kernel:
        made = pattern_of(*masks, block, exploring, sizes)
    else:
        made = Positions(*places_apart(*masks, exploring, sizes))
    note(made, block, masks.forward.shape)
    return made


def note(sets: Index | Masks, block: tuple[int, int], shape: torch.Size) -> None:
    """Note in `MADE` that sets are made as they should be, if they have numbers."""
    if all(map(readable, tensors_of(sets))):
        MADE.add(tensors_of(sets), (block, shape))


def masks_at(index: Index, block: tuple[int, int], shape: torch.Size) -> Masks:
    """Return the sets that an index tells of; inverse of `index_of`."""
    places, size = index.flat_index(block, shape), shape.numel()
    masks = []
    for chosen in (places[: index.active_count], places):
        blank = torch.zeros(size + 1, dtype=torch.bool, device=places.device)
        masks.append(blank.index_fill(0, chosen.flatten(), True)[:-1].view(shape))
    return Masks(*masks)


def reindex(old: Index, masks: Masks, block: tuple[int, int], sizes: tuple[int, int]) -> Index:
    """Return the index of ``masks``, in tensors of the shapes of ``old`` if B has become A."""
    active = old.active_count * math.prod(block)
    spare = old.exploring_count if sizes == (active, active) else None
    return index_of(masks, block, sizes, isinstance(old, Pattern), spare)


def flat_pieces(index: Index, block: tuple[int, int], shape: torch.Size) -> Iterator[Tensor]:
    """Return ``index.flat_index`` in pieces, for the memory that it takes; the host waits."""
    if isinstance(index, Positions):
        return chain.from_iterable(torch.split(part, PIECE) for part in index)
    matrix = shape[0], math.prod(shape[1:])
    parts = (index.forward, index.exploring)
    return chain.from_iterable(flat_in_bands(part, block, matrix) for part in parts)


def split_in_pieces(theta: Tensor, places: Tensor) -> Tensor:
    """Return what `split` does, in pieces, for the memory that it takes."""
    return split_by(theta, torch.split(places, PIECE), places.shape)


@torch.no_grad()
def split_by(theta: Tensor, pieces: Iterable[Tensor], shape: Sequence[int]) -> Tensor:
    """Gather the values of B from θ, piece by piece.

    Args:
        theta: The weight.
        pieces: Where they stand in the flat θ, in their order; see `split`.
        shape: Of all values.

    Returns:
        The values.
    """
    flat, values, done = theta.flatten(), theta.new_empty(shape), 0
    if theta.is_meta:  # where pieces cost time alone
        return values
    for where in pieces:
        values[done : (done := done + len(where))] = split(flat, where.to(flat.device))
    return values


def old_slots(old: Tensor, new: Tensor, size: int) -> Tensor:
    """Return where the values come from at a refresh.

    Args:
        old: Where the values stood in the flat θ.
        new: Where they stand now.
        size: Entries of θ.

    Returns:
        For each value the flat index of its old place, in the shape of ``new``; −1 for what
        was not in B and where a place is unused.
    """
    dtype = torch.int32 if old.numel() <= INDEX_LIMIT else torch.int64
    place = old.new_full((size + 1,), -1, dtype=dtype)
    place[old.flatten()] = torch.arange(old.numel(), dtype=dtype, device=old.device)
    place[size] = -1
    return place[new]


def carry(slot: Tensor, source: Tensor) -> Tensor:
    """Let an optimiser slot follow its weights; zero for what was not in B.

    Args:
        slot: One number per value.
        source: What `old_slots` returns.

    Returns:
        The slot, in the shape of ``source``.
    """
    return torch.where(source >= 0, slot.flatten()[source.clamp(min=0)], slot.new_zeros(()))
