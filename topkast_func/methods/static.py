"""Static sparse training: a random mask, for ever."""

from dataclasses import dataclass
from typing import ClassVar

from topkast_func.methods.base import Method, Situation, drawn
from topkast_func.ranking import Sets


@dataclass(frozen=True)
class Static(Method):
    """See `static`."""

    reads_sets: ClassVar[bool] = True

    def sets(self, situation: Situation) -> Sets:
        """Draw A once, and stay with it."""
        if situation.active is None:
            return drawn(situation)
        return situation.active, situation.active


def static() -> Method:
    """Draw A at random once and train it; the baseline of Mocanu et al. (2018) and of RigL.

    The random numbers follow from the state's seed.

    Returns:
        The method.
    """
    return Static()
