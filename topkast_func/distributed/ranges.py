"""Rankings of a tensor of which each rank has a range: those of `ranking`, without gathering it.

Each rank counts its own magnitudes by their bits; what is ranked by are the counts of all.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from topkast_func.distributed.ranks import Ranks
from topkast_func.ranking import NO_RANKING, NaNParameterError, Sets, top_by_bits


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
        scores: Of a dtype of `ranking.RANKED`, 1-D: those of this rank.
        places: Where they stand in its range, ascending; None where they are all of it.
        forward: How many of all ranks to mark first.
        backward: How many to mark second, at least as many.

    Returns:
        Two bool tensors of the shape of ``scores``.

    Raises:
        NaNParameterError: A score of a rank is NaN; on every rank.
    """

    def total(counts: NDArray[Any]) -> NDArray[np.int64]:
        return ranks.reduced(torch.from_numpy(counts), dist.ReduceOp.SUM).numpy()

    where = None if places is None else places.cpu()
    marks = top_by_bits(scores.cpu(), where, forward, backward, first=start, total=total)
    if marks is None:
        raise NaNParameterError(NO_RANKING.format(name))
    first, second = marks
    return first.to(scores.device), second.to(scores.device)
