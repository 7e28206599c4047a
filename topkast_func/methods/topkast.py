"""Top-KAST: A and B are the largest in magnitude, and all of B learns."""

from dataclasses import dataclass
from typing import ClassVar

from topkast_func.methods.base import Method, Situation
from topkast_func.ranking import Sets, top_sets


@dataclass(frozen=True)
class TopKast(Method):
    """See `topkast`."""

    explores: ClassVar[bool] = True

    def sets(self, situation: Situation) -> Sets:
        """Take the largest in magnitude; one ranking gives both sets."""
        return top_sets(situation.name, situation.scores, situation.forward, situation.backward)


def topkast() -> Method:
    """Choose A and B by magnitude (Jayakumar et al., "Top-KAST", NeurIPS 2020).

    Returns:
        The method, the default of `TopKastConfig`.
    """
    return TopKast()
