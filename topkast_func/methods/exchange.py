"""Methods that draw A at random and then exchange parts of it, or none; B is A."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from topkast_func.checks import check_fraction
from topkast_func.filling import drawn_among, drawn_beside, largest_beside
from topkast_func.methods.base import Entry, Method, Situation, drawn
from topkast_func.ranking import Sets, largest_among


@dataclass(frozen=True)
class Static(Method):
    """See `static`."""

    @property
    def reads_sets(self) -> bool:
        """Whether a refresh needs to know the old sets."""
        return True

    def sets(self, situation: Situation) -> Sets:
        """Draw A once, and stay with it; where its size changes, draw which go or come."""
        if situation.active is None:
            return drawn(situation)
        held, draw = situation.held, situation.generator
        staying = min(held, situation.forward)
        stay = drawn_among(situation.active, held, staying, draw)
        active = drawn_beside(stay, staying, situation.forward, draw, situation.group)
        return active, active


@dataclass(frozen=True)
class Exchanging(Method):
    """At a refresh the smallest of A go, less and less along half a cosine, and others come at 0.

    Attributes:
        drop_fraction: α, fraction of A that goes at first, in [0, 1].
    """

    drop_fraction: float = 0.3

    def __post_init__(self) -> None:
        """Check the fraction and store it as Python's."""
        checked = check_fraction("drop_fraction", self.drop_fraction)
        object.__setattr__(self, "drop_fraction", checked)

    @property
    def enters_at(self) -> Entry:
        """How an entry that newly enters A starts."""
        return "zero"

    def sets(self, situation: Situation) -> Sets:
        """Keep the largest of A, and let as many come as are missing."""
        if situation.active is None:
            return drawn(situation)
        staying = _surviving(situation, self.drop_fraction)
        stay = largest_among(situation.name, situation.active, situation.scores, staying)
        active = self.grown(situation, stay, staying)
        return active, active

    def grown(self, situation: Situation, stay: Tensor, staying: int) -> Tensor:
        """Mark A: what stays, and what comes beside it.

        Args:
            situation: What comes is chosen from; what was just dropped may come back.
            stay: bool, what stays.
            staying: How many stay.

        Returns:
            bool, as many as A is to have.

        Raises:
            NotImplementedError: The method is abstract.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class SparseEvolution(Exchanging):
    """See `set`."""

    def grown(self, situation: Situation, stay: Tensor, staying: int) -> Tensor:
        """Draw what comes at random."""
        size, draw = situation.forward, situation.generator
        return drawn_beside(stay, staying, size, draw, situation.group)


@dataclass(frozen=True)
class RigL(Exchanging):
    """See `rigl`."""

    reads_gradient: ClassVar[bool] = True

    def grown(self, situation: Situation, stay: Tensor, staying: int) -> Tensor:
        """Take those of the largest gradient."""
        if situation.gradient is None:
            raise ValueError(
                f"{self} chooses by the gradient: pass refresh(..., gradients=dense_gradients("
                "model, loss_fn, state, batch))"
            )
        size, gradient = situation.forward, situation.gradient
        return largest_beside(situation.name, stay, gradient, size, size, situation.group)[0]


def _surviving(situation: Situation, drop_fraction: float) -> int:
    """Return how many of A stay: all but α/2·(1 + cos(π t / T_end)) of it (RigL, section 3)."""
    fraction = drop_fraction / 2 * (1 + math.cos(math.pi * situation.progress))
    size = min(situation.held, situation.forward)  # where A is to shrink, it does so first
    return size - min(int(fraction * size), situation.scores.numel() - size)


def static() -> Method:
    """Draw A at random once and train it; the baseline of Mocanu et al. (2018) and of RigL.

    Where the sparsity changes over time, as few as can be go or come, at random. The random
    numbers follow from the state's seed.

    Returns:
        The method.
    """
    return Static()


def set(drop_fraction: float = 0.3) -> Method:
    """Exchange the smallest weights for random ones (Mocanu et al., "SET", 2018).

    At a refresh a fraction of A goes, which falls along half a cosine to zero at
    ``explore_until`` (constant where that is None), and as many others come, with zero (under
    powerpropagation, whose gradient is 0 there, see ``entry`` of `topkast`). The random numbers
    follow from the state's seed and step.

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


def rigl(drop_fraction: float = 0.3) -> Method:
    """Exchange the smallest weights for those of the largest gradient.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020: at a refresh a
    fraction of A goes, which falls along half a cosine to zero at ``explore_until`` (constant
    where that is None); as many come where the dense gradient of the batch at hand is largest,
    with zero (under powerpropagation, whose gradient is 0 there, see ``entry`` of `topkast`). A
    is drawn at random at the start.

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
