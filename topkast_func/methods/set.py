"""Sparse evolutionary training: the smallest weights go, random ones come."""

from dataclasses import dataclass
from typing import ClassVar

from topkast_func.checks import check_fraction
from topkast_func.methods.base import Method, Situation, drawn, survivors
from topkast_func.ranking import Sets, drawn_among


@dataclass(frozen=True)
class SparseEvolution(Method):
    """See `set`.

    Attributes:
        drop_fraction: α, fraction in [0, 1].
    """

    drop_fraction: float = 0.3
    reads_sets: ClassVar[bool] = True
    grows_from_zero: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fraction."""
        check_fraction("drop_fraction", self.drop_fraction)

    def sets(self, situation: Situation) -> Sets:
        """Keep the largest of A, and draw as many as were dropped from the rest."""
        if situation.active is None:
            return drawn(situation)
        stay = survivors(situation, situation.active, self.drop_fraction)
        count = situation.forward - int(stay.sum())
        active = stay | drawn_among(~stay, count, situation.generator)
        return active, active


def set(drop_fraction: float = 0.3) -> Method:
    """Exchange the smallest weights for random ones (Mocanu et al., "SET", 2018).

    At a refresh a fraction of A goes, which falls along half a cosine to zero at
    ``explore_until`` (constant where that is None), and as many others come, with zero. The
    random numbers follow from the state's seed and step.

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
