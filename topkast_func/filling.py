"""Sets that continue others: entries that are taken stay, and others join them.

Their counts are exact in all of a tensor, or in each group of N:M, as those of `top_sets` are.
"""

import math

import torch
from torch import Tensor

from topkast_func.places import places_of, sent
from topkast_func.ranking import Sets, drawn_among, largest_among, top_sets


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
        scores: float32 or float64, of the same shape.
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
        scores: float32 or float64, any shape.
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
    others = taken.numel() - held
    if group is None:
        return taken | drawn_among(~taken, others, count - held, generator)
    drawn = sent(torch.randperm(others, generator=generator, device="cpu"), taken.device)
    lots = torch.zeros(taken.numel(), dtype=torch.float64, device=taken.device)
    lots.index_copy_(0, places_of(~taken, others), drawn.double())
    return largest_beside("lots", taken, lots.view(taken.shape), count, count, group)[0]
