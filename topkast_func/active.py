"""The values of B of a weight, apart from its θ: split, merge, and what follows a weight."""

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from topkast_func.kernels.pattern import INDEX_LIMIT, Pattern, block_of, flat, pattern_of
from topkast_func.types import Masks, Params, Tensors


class Positions(NamedTuple):
    """The two disjoint sets of a weight that no kernel computes, as flat indices into θ.

    Attributes:
        forward: A, int64, [|A|], ascending.
        exploring: B∖A, int64, ascending; the number of entries of θ where a place is unused.
    """

    forward: Tensor
    exploring: Tensor


Sets: TypeAlias = Pattern | Positions
"""A and B∖A of a weight: a pattern, of entries or blocks, where a kernel computes it."""


def positions_of(masks: Masks, exploring: int | None = None) -> Positions:
    """Return the positions of the sets.

    Args:
        masks: The sets.
        exploring: Places to keep for B∖A at the least; None for as many as it has entries.

    Returns:
        The positions, on the device of the masks.
    """
    active, ghosts = (
        torch.from_numpy(np.flatnonzero(mask.cpu().numpy())).to(mask.device)
        for mask in (masks.forward, masks.backward & ~masks.forward)
    )
    spare = max(0, (exploring or 0) - len(ghosts))
    unused = ghosts.new_full((spare,), masks.forward.numel())
    return Positions(active, torch.cat((ghosts, unused)))


def anew(old: Sets, masks: Masks, block: tuple[int, int]) -> Sets:
    """Return the sets of ``masks``, in tensors of the shapes of ``old`` if A is as large."""
    same = int(masks.forward.sum()) == active_places(old) * math.prod(block)
    if isinstance(old, Positions):
        return positions_of(masks, old.exploring.shape[0] if same else None)
    return pattern_of(*masks, block, old.exploring.columns.shape[0] if same else None)


def active_places(sets: Sets) -> int:
    """Return how many places of the values are those of A; they come first."""
    return (sets.forward if isinstance(sets, Positions) else sets.places).shape[0]


def where(sets: Sets, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """Return where the values stand in the flat θ.

    Args:
        sets: The sets.
        block: (r, c) of a block.
        shape: Shape of θ.

    Returns:
        int64, in the shape of the values; the number of entries of θ where a place is unused.
    """
    if isinstance(sets, Positions):
        return torch.cat(sets)
    matrix = (shape[0], shape[1])
    return torch.cat([flat(part, block, matrix) for part in (sets.forward, sets.exploring)])


def split(theta: Tensor, places: Tensor) -> Tensor:
    """Gather the values of B from θ.

    Args:
        theta: The weight.
        places: What `where` returns.

    Returns:
        The values, in the shape of ``places``; zero where a place is unused.
    """
    stored = places < theta.numel()
    return torch.where(stored, theta.flatten()[places * stored], 0.0)


def merge(values: Tensor, theta: Tensor, places: Tensor) -> Tensor:
    """Scatter the values of B into a copy of θ; inverse of `split` on B.

    Args:
        values: The values.
        theta: The weight; only its entries outside B are read.
        places: What `where` returns.

    Returns:
        θ, up to date on B, in the shape and on the device of ``theta``.
    """
    merged = theta.clone(memory_format=torch.contiguous_format)
    stored = places < theta.numel()
    merged.view(-1)[places[stored].to(theta.device)] = values[stored].to(theta.device)
    return merged


def alpha(values: Tensor, sets: Sets, shape: torch.Size) -> Tensor:
    """Return α with the gradient of the identity on B.

    Args:
        values: The values.
        sets: The sets.
        shape: Shape of θ.

    Returns:
        α: the values on A, exactly 0 elsewhere.
    """
    active = active_places(sets)
    exploring = values[active:]
    seen = torch.cat((values[:active], exploring - exploring.detach()))
    with_spare = values.new_zeros(math.prod(shape) + 1)
    return with_spare.index_put((where(sets, block_of(values), shape),), seen)[:-1].view(shape)


def sources(old: Tensor, new: Tensor, size: int) -> Tensor:
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


def followed(slot: Tensor, source: Tensor) -> Tensor:
    """Let an optimiser slot follow its weights; zero for what was not in B.

    Args:
        slot: One number per value.
        source: What `sources` returns.

    Returns:
        The slot, in the shape of ``source``.
    """
    return torch.where(source >= 0, slot.flatten()[source.clamp(min=0)], 0.0)


def straight_through(theta: Tensor, masks: Masks) -> Tensor:
    """Return α = θ·1_A with the gradient of the identity on B.

    Args:
        theta: The weight.
        masks: Its sets.

    Returns:
        α = θ·1_A + (θ − stop(θ))·1_{B∖A}: exactly θ on A and exactly 0 elsewhere.
    """
    ghost = torch.where(masks.backward, theta - theta.detach(), 0.0)
    return torch.where(masks.forward, theta, ghost)


def straight_through_all(params: Params, masks: Mapping[str, Masks]) -> Tensors:
    """Return α of every parameter, dense ones as they are.

    Args:
        params: θ by name.
        masks: Sets by name.

    Returns:
        α by name, in the order of ``params``.
    """
    return {
        name: straight_through(theta, masks[name]) if name in masks else theta
        for name, theta in params.items()
    }
