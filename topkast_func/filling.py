"""Sets that continue others: entries that are taken stay, and others join them.

Their counts are exact in all of a tensor, or in each group of N:M, as those of `top_sets` are.
"""

import math

import numpy as np
import torch
from torch import Tensor

from topkast_func.places import sent
from topkast_func.ranking import Sets, largest_among, top_sets

FEW = 2**10
"""Entries of a group up to which lots of 16 bits do: hardly two draw the same."""


def largest_beside(
    name: str,
    taken: Tensor,
    scores: Tensor,
    forward: int,
    backward: int,
    group: int | None = None,
) -> Sets:
    """Mark what is taken, before all others, and beside it the largest, as `top_sets` does.

    Args:
        name: Name of the parameter, for errors.
        taken: bool; where a group has more than are to be marked, their tie keys decide.
        scores: Of a dtype of `ranking.RANKED`, of the same shape.
        forward: How many to mark first, what is taken included.
        backward: How many to mark second, at least as many.
        group: M, see `grouped`; None where all are one group.

    Returns:
        Two bool tensors of the shape of ``scores``, the first contained in the second.

    Raises:
        NaNParameterError: The score on the CPU of an entry that is not taken is NaN.
    """
    most = torch.finfo(scores.dtype).max
    ranked = torch.where(taken, torch.inf, scores.clamp(-most, most))
    return top_sets(name, ranked, forward, backward, group)


def exchanged_sets(
    name: str,
    scores: Tensor,
    active: Tensor,
    held: int,
    forward: int,
    backward: int,
    fraction: float,
    group: int | None = None,
) -> Sets:
    """Mark the largest magnitudes, of which the largest of the old A are to be.

    Args:
        name: Name of the parameter, for errors.
        scores: Of a dtype of `ranking.RANKED`, any shape.
        active: 1_A as it is, bool, of the same shape.
        held: How many entries that has.
        forward: How many to mark first, at least 1.
        backward: How many to mark second, at least as many.
        fraction: Share of A that may go, in (0, 1]: max(1, floor(fraction·n + 1/2)) of the n
            entries that A could keep, in whichever groups they stand.
        group: M, see `grouped`; None where all are one group.

    Returns:
        Two bool tensors of the shape of ``scores``, the first contained in the second.

    Raises:
        NaNParameterError: A score on the CPU is NaN; see `top_sets`.
    """
    keep = min(held, forward)
    exchanged = max(1, math.floor(fraction * keep + 0.5))
    stay = largest_among(name, active, scores, max(0, keep - exchanged))
    return largest_beside(name, stay, scores, forward, backward, group)


def drawn_beside(
    taken: Tensor, held: int, count: int, generator: torch.Generator, group: int | None = None
) -> Tensor:
    """Mark what is taken, and beside it others at random, as many in each group.

    Args:
        taken: bool; where a group has more than are to be marked, their tie keys decide.
        held: How many of them are set.
        count: How many to mark, what is taken included.
        generator: Of random numbers, on the CPU.
        group: M, see `grouped`; None where all are one group.

    Returns:
        bool, of the same shape.
    """
    size = taken.numel()
    if group is None or group == size:
        return drawn_among(~taken, size - held, count - held, generator).logical_or_(taken)
    kind = torch.int16 if group <= FEW else torch.int32
    most = torch.iinfo(kind).max
    lots = torch.randint(most, (size,), generator=generator, dtype=kind, device="cpu")
    lots = sent(lots, taken.device).view(taken.shape)
    if held:
        lots = torch.full_like(lots, most).masked_scatter_(~taken, lots)
    return top_sets("lots", lots, count, count, group)[0]


def drawn_among(candidates: Tensor, among: int, count: int, generator: torch.Generator) -> Tensor:
    """Mark candidates at random, each set of them being as likely as any other.

    Args:
        candidates: bool, any shape.
        among: How many of them are set, at least ``count``.
        count: How many to mark, at least 0.
        generator: Of random numbers, on the CPU.

    Returns:
        bool, of the same shape.
    """
    few = min(count, among - count)
    lots = torch.zeros(candidates.numel(), dtype=torch.bool, device="cpu")  # as many as may be set
    own = lots[:among]
    while missing := few - int(np.count_nonzero(own.numpy())):  # what is drawn twice counts once
        own[torch.randint(among, (missing,), generator=generator, device="cpu")] = True
    if few != count:
        own.logical_not_()
    if among == candidates.numel():
        return sent(lots, candidates.device).view(candidates.shape)
    return torch.zeros_like(candidates).masked_scatter_(candidates, sent(lots, candidates.device))
