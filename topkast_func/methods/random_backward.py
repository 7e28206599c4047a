"""Top-KAST with an exploration set drawn at random: the paper's ablation."""

from dataclasses import dataclass
from typing import ClassVar

from topkast_func.methods.base import Method, Situation
from topkast_func.ranking import Sets, drawn_among, top_sets


@dataclass(frozen=True)
class RandomBackward(Method):
    """See `random_backward`."""

    explores: ClassVar[bool] = True

    def sets(self, situation: Situation) -> Sets:
        """Take the largest in magnitude for A, and add others at random for B."""
        count = situation.forward
        active, _ = top_sets(situation.name, situation.scores, count, count)
        more = situation.backward - count
        return active, active | drawn_among(~active, more, situation.generator)


def random_backward() -> Method:
    """Choose A by magnitude and draw B∖A anew at each refresh (Top-KAST, ablations).

    The random numbers follow from the state's seed and step.

    Returns:
        The method.
    """
    return RandomBackward()
