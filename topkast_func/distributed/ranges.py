"""Rankings of a tensor of which each rank has a range: those of `ranking`, without gathering it.

A round counts, on all ranks, the entries that the rounds before left open, by their next digit.
Those above the digit in which the border lies are taken, those below are out. After the digits of
the magnitudes come those of the tie keys, which no two entries share.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from topkast_func.distributed.ranks import Ranks
from topkast_func.ranking import NO_RANKING, NaNParameterError, Sets
from topkast_func.tiebreak import splitmix64

DIGIT = 16
"""Bits that one round tells apart."""


def top_over(
    ranks: Ranks,
    start: int,
    name: str,
    scores: Tensor,
    places: Tensor | None,
    forward: int,
    backward: int,
) -> Sets:
    """Mark the largest magnitudes of all ranks; a collective call.

    Args:
        ranks: The processes.
        start: Where the range of this rank begins in the flat tensor.
        name: Name of the parameter, for errors.
        scores: float32 or float64, 1-D: those of this rank.
        places: Where they stand in its range, ascending; None where they are all of it.
        forward: How many of all ranks to mark first.
        backward: How many to mark second, at least as many.

    Returns:
        Two bool tensors of the shape of ``scores``.

    Raises:
        NaNParameterError: A score of a rank is NaN; on every rank.
    """
    if ranks.reduced(scores.isnan().sum(), dist.ReduceOp.SUM):
        raise NaNParameterError(NO_RANKING.format(name))
    second = _largest(ranks, scores, places, start, backward)
    same = forward == backward
    return second if same else _largest(ranks, scores, places, start, forward), second


def _largest(ranks: Ranks, scores: Tensor, places: Tensor | None, start: int, count: int) -> Tensor:
    """Mark the largest of all ranks, by a radix sort of which only the border is followed."""
    bits = 8 * scores.itemsize
    order = scores.abs().view(torch.int64 if bits == 64 else torch.int32)
    marked, tied, count = _taken(ranks, order, bits, count)
    keys = ~splitmix64((tied if places is None else places[tied]) + start)
    first, last, _ = _taken(ranks, keys, 64, count)
    marked[tied[first]] = True
    marked[tied[last]] = True
    return marked


def _taken(ranks: Ranks, order: Tensor, bits: int, count: int) -> tuple[Tensor, Tensor, int]:
    """Take the largest numbers, but for those at the border.

    Args:
        ranks: The processes.
        order: The numbers of this rank, unsigned integers.
        bits: How many bits they have.
        count: How many of all ranks to take.

    Returns:
        Which are taken, bool; where those at the border are, which are equal, or all to be taken;
        and how many of these, of all ranks, are missing.
    """
    taken, left = torch.zeros(order.shape, dtype=torch.bool, device=order.device), None
    for shift in range(bits - DIGIT, -1, -DIGIT):
        digit = ((order if left is None else order[left]) >> shift & (1 << DIGIT) - 1).long()
        found = torch.bincount(digit, minlength=1 << DIGIT)
        found = ranks.reduced(found, dist.ReduceOp.SUM).cpu()
        reached = found.flip(0).cumsum(0).flip(0)  # entries of each digit and of those above
        if reached[0] == count:
            break
        border = int((reached >= count).nonzero().max())
        count -= int(reached[border] - found[border])
        above, within = digit > border, (digit == border).nonzero().squeeze(1)
        if left is None:
            taken, left = above, within
        else:
            taken[left[above]] = True
            left = left[within]
    return taken, torch.arange(order.numel(), device=order.device) if left is None else left, count
