"""RigL: the smallest weights go, those of the largest gradient come."""

from dataclasses import dataclass
from typing import ClassVar

from topkast_func.checks import check_fraction
from topkast_func.methods.base import Method, Situation, drawn, survivors
from topkast_func.ranking import Sets, largest_among


@dataclass(frozen=True)
class RigL(Method):
    """See `rigl`.

    Attributes:
        drop_fraction: α, fraction in [0, 1].
    """

    drop_fraction: float = 0.3
    reads_gradient: ClassVar[bool] = True
    reads_sets: ClassVar[bool] = True
    grows_from_zero: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fraction."""
        check_fraction("drop_fraction", self.drop_fraction)

    def sets(self, situation: Situation) -> Sets:
        """Keep the largest of A, and grow where the gradient is largest among the rest."""
        if situation.active is None or situation.gradient is None:
            return drawn(situation)
        stay = survivors(situation, situation.active, self.drop_fraction)
        count = situation.forward - int(stay.sum())
        name = f"{situation.name} (its gradient)"
        active = stay | largest_among(name, ~stay, situation.gradient, count)
        return active, active


def rigl(drop_fraction: float = 0.3) -> Method:
    """Exchange the smallest weights for those of the largest gradient.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020: at a refresh a
    fraction of A goes, which falls along half a cosine to zero at ``explore_until`` (constant
    where that is None); as many come where the dense gradient of the batch at hand is largest,
    with zero. A is drawn at random at the start.

    Args:
        drop_fraction: Fraction of A that goes at first, in [0, 1].

    Returns:
        The method.

    Raises:
        TypeError: ``drop_fraction`` is no number.
        ValueError: It is out of range.

    Departures:
        The paper refreshes in place of a step; here the step follows, on the same batch.
    """
    return RigL(drop_fraction)
