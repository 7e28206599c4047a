"""What a method of sparse training decides: the sparsities, the sets, and how a weight enters A."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from topkast_func.ranking import NaNParameterError, Sets, drawn_among
from topkast_func.sparsity import Allocation

Entry: TypeAlias = Literal["value", "zero", "threshold"]
"""With what an entry that newly enters A starts: see `topkast`."""


class Situation(NamedTuple):
    """What the sets of one parameter are chosen from. Where blocks are chosen, each is an entry.

    Attributes:
        name: Name of the parameter, for errors.
        scores: float, any shape: entries rank by magnitude.
        forward: How many entries A is to have.
        backward: How many B is to have.
        active: 1_A as it is, of the shape of ``scores``; None at the start, and unless the
            method reads it.
        gradient: Gradient of the loss at α, ranks as ``scores`` do; None unless the method
            reads it.
        progress: Share of the exploration that is over, in [0, 1]; 0 where it has no end.
        generator: Of random numbers, on the CPU.
        held: How many entries A has as it is; 0 where ``active`` is None.
    """

    name: str
    scores: Tensor
    forward: int
    backward: int
    active: Tensor | None
    gradient: Tensor | None
    progress: float
    generator: torch.Generator
    held: int = 0


@dataclass(frozen=True)
class Method:
    """A method. Unless it explores, it trains what it computes with: B is A, without a penalty.

    Attributes:
        sparsifies: Whether any parameter is sparse at all.
        explores: Whether the backward sparsity is read, and the exploration penalty in place.
        reads_gradient: Whether the sets follow the gradient of all weights.
    """

    sparsifies: ClassVar[bool] = True
    explores: ClassVar[bool] = False
    reads_gradient: ClassVar[bool] = False

    @property
    def enters_at(self) -> Entry:
        """With what an entry that newly enters A starts."""
        return "value"

    @property
    def reads_sets(self) -> bool:
        """Whether a refresh needs to know the old sets."""
        return self.enters_at != "value"

    def sparsities(self, asked: Allocation, step: int) -> Allocation:
        """Return the sparsities of a parameter at a step, from those that it is allocated.

        Args:
            asked: What the configuration allocates; the same twice unless the method explores.
            step: Number of the step.

        Returns:
            The sparsities in force.
        """
        return asked

    def starts(self) -> tuple[int, ...]:
        """Return the steps, but for 0, at which the sparsities change by the method itself."""
        return ()

    def sets(self, situation: Situation) -> Sets:
        """Choose A and B.

        Args:
            situation: What they are chosen from.

        Returns:
            1_A and 1_B, bool, of the shape of the scores, with as many entries as are asked for.

        Raises:
            NotImplementedError: The method is abstract.
        """
        raise NotImplementedError(f"{type(self).__name__} chooses no sets: override `sets`")


def drawn(situation: Situation) -> Sets:
    """Draw A at random; B is A.

    Args:
        situation: What it is chosen from.

    Returns:
        1_A, twice.

    Raises:
        NaNParameterError: The parameter holds NaN.
    """
    if situation.scores.isnan().any():
        raise NaNParameterError(f"params[{situation.name!r}] holds NaN")
    everything = torch.ones_like(situation.scores, dtype=torch.bool)
    active = drawn_among(everything, everything.numel(), situation.forward, situation.generator)
    return active, active
