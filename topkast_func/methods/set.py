"""Sparse evolutionary training: the smallest weights go, random ones come."""

from dataclasses import dataclass

from torch import Tensor

from topkast_func.methods.base import Method, Situation
from topkast_func.methods.exchanging import Exchanging
from topkast_func.ranking import drawn_among


@dataclass(frozen=True)
class SparseEvolution(Exchanging):
    """See `set`."""

    def grown(self, situation: Situation, candidates: Tensor, count: int) -> Tensor:
        """Draw them at random."""
        return drawn_among(candidates, count, situation.generator)


def set(drop_fraction: float = 0.3) -> Method:
    """Exchange the smallest weights for random ones (Mocanu et al., "SET", 2018).

    At a refresh a fraction of A goes, which falls along half a cosine to zero at
    ``explore_until`` (constant where that is None), and as many others come, with zero (under
    powerpropagation, whose gradient is 0 there, with what they had). The random numbers follow
    from the state's seed and step.

    Args:
        drop_fraction: Fraction of A that goes at first, in [0, 1].

    Returns:
        The method.

    Raises:
        TypeError: ``drop_fraction`` is no number.
        ValueError: It is out of range.

    Departures:
        SET drops the smallest positive and the largest negative weights and starts new ones at
        random; here, as in later comparisons (RigL, ITOP), magnitude decides and they start at 0.
    """
    return SparseEvolution(drop_fraction)
