"""What SET and RigL share: at a refresh the smallest weights go, and as many others come."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from topkast_func.checks import check_fraction
from topkast_func.methods.base import Method, Situation, drawn
from topkast_func.ranking import Sets, largest_among


@dataclass(frozen=True)
class Exchanging(Method):
    """Draws A at random at the start; B is A. What goes falls along half a cosine to nothing.

    Attributes:
        drop_fraction: α, fraction of A that goes at first, in [0, 1].
    """

    drop_fraction: float = 0.3
    reads_sets: ClassVar[bool] = True
    grows_from_zero: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fraction."""
        check_fraction("drop_fraction", self.drop_fraction)

    def sets(self, situation: Situation) -> Sets:
        """Keep the largest of A, and let as many come as are missing."""
        if situation.active is None:
            return drawn(situation)
        stay = _survivors(situation, situation.active, self.drop_fraction)
        active = stay | self.grown(situation, ~stay, situation.forward - int(stay.sum()))
        return active, active

    def grown(self, situation: Situation, candidates: Tensor, count: int) -> Tensor:
        """Mark which of the candidates come.

        Args:
            situation: What they are chosen from.
            candidates: bool; what was just dropped is among them.
            count: How many come.

        Returns:
            bool, ``count`` of the candidates.

        Raises:
            NotImplementedError: The method is abstract.
        """
        raise NotImplementedError


def _survivors(situation: Situation, active: Tensor, drop_fraction: float) -> Tensor:
    """Drop the smallest of A: α/2·(1 + cos(π t / T_end)) of it (RigL, section 3)."""
    fraction = drop_fraction / 2 * (1 + math.cos(math.pi * situation.progress))
    size = min(int(active.sum()), situation.forward)  # where A is to shrink, it does so first
    dropped = min(int(fraction * size), active.numel() - size)
    return largest_among(situation.name, active, situation.scores, size - dropped)
