"""RigL: the smallest weights go, those of the largest gradient come."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from topkast_func.methods.base import Method, Situation
from topkast_func.methods.exchanging import Exchanging
from topkast_func.ranking import largest_among


@dataclass(frozen=True)
class RigL(Exchanging):
    """See `rigl`."""

    reads_gradient: ClassVar[bool] = True

    def grown(self, situation: Situation, candidates: Tensor, count: int) -> Tensor:
        """Take those of the largest gradient."""
        if situation.gradient is None:
            raise ValueError(
                f"{self} chooses by the gradient: pass refresh(..., gradients=dense_gradients("
                "model, loss_fn, state, batch))"
            )
        name = f"{situation.name} (its gradient)"
        return largest_among(name, candidates, situation.gradient, count)


def rigl(drop_fraction: float = 0.3) -> Method:
    """Exchange the smallest weights for those of the largest gradient.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020: at a refresh a
    fraction of A goes, which falls along half a cosine to zero at ``explore_until`` (constant
    where that is None); as many come where the dense gradient of the batch at hand is largest,
    with zero (under powerpropagation, whose gradient is 0 there, with what they had). A is drawn
    at random at the start.

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
