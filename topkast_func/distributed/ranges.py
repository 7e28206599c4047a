"""Rankings of a tensor of which each rank has a range: those of `ranking`, without gathering it.

A round counts, on all ranks, the entries that the rounds before left open, by their next digit.
Those above the digit in which the border lies are marked, those below are out. After the digits of
the magnitudes come those of the tie keys, which no two entries share.
"""

from collections.abc import Iterator

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
    if places is None:
        places = torch.arange(scores.numel(), device=scores.device)
    second = _largest(ranks, scores, places + start, backward)
    same = forward == backward
    return second if same else _largest(ranks, scores, places + start, forward), second


def _largest(ranks: Ranks, scores: Tensor, places: Tensor, count: int) -> Tensor:
    """Mark the largest of all ranks, by a radix sort of which only the border is followed."""
    marked = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    left = torch.arange(scores.numel(), device=scores.device)
    for digits in _digits(scores, places):
        digit = digits[left]
        found = torch.bincount(digit, minlength=1 << DIGIT)
        found = ranks.reduced(found, dist.ReduceOp.SUM).cpu()
        reached = found.flip(0).cumsum(0).flip(0)  # entries of each digit and of those above
        if reached[0] == count:
            break
        border = int((reached >= count).nonzero().max())
        marked[left[digit > border]] = True
        left = left[digit == border]
        count -= int(reached[border] - found[border])
    marked[left] = True
    return marked


def _digits(scores: Tensor, places: Tensor) -> Iterator[Tensor]:
    """Yield the digits that entries are ordered by, the largest first, the most telling first."""
    bits = 8 * scores.itemsize
    order = scores.abs().view(torch.int64 if bits == 64 else torch.int32)
    for shift in range(bits - DIGIT, -1, -DIGIT):
        yield (order >> shift & 0xFFFF).long()
    keys = ~splitmix64(places)
    for shift in range(64 - DIGIT, -1, -DIGIT):
        yield keys >> shift & 0xFFFF
