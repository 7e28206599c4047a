"""Static sparse training: a random mask, for ever."""

from dataclasses import dataclass
from typing import ClassVar

from topkast_func.methods.base import Method, Situation, drawn
from topkast_func.ranking import Sets, drawn_among


@dataclass(frozen=True)
class Static(Method):
    """See `static`."""

    reads_sets: ClassVar[bool] = True

    def sets(self, situation: Situation) -> Sets:
        """Draw A once, and stay with it; where its size changes, draw which go or come."""
        if situation.active is None:
            return drawn(situation)
        old, count = situation.active, situation.forward
        stay = drawn_among(old, min(int(old.sum()), count), situation.generator)
        active = stay | drawn_among(~old, count - int(stay.sum()), situation.generator)
        return active, active


def static() -> Method:
    """Draw A at random once and train it; the baseline of Mocanu et al. (2018) and of RigL.

    Where the sparsity changes over time, as few as can be go or come, at random. The random
    numbers follow from the state's seed.

    Returns:
        The method.
    """
    return Static()
