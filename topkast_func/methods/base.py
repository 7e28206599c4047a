"""What a method of sparse training decides: the sparsities, the sets, and how a weight enters A."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from topkast_func.filling import drawn_beside
from topkast_func.ranking import NaNParameterError, Sets
from topkast_func.sparsity import Allocation

Entry: TypeAlias = Literal["value", "zero", "threshold"]
"""How an entry that newly enters A starts: see `topkast`."""


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
        group: M, where A and B are to have as many entries in each group of M consecutive ones of
            the second axis; None where their counts are those of the tensor alone.
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
    group: int | None = None


@dataclass(frozen=True)
class Method:
    """A method. Unless it explores, it trains what it computes with: B is A, without a penalty.

    One of your own is a subclass that overrides `sets`, and what else it differs in. Let it be a
    frozen dataclass at the top of a module: configurations that hold it can then be compared,
    hashed and pickled. It chooses by what `Situation` tells, so that the same state gives the same
    sets, and draws by ``situation.generator`` alone. It is code, which JSON and files do not hold:
    ``TopKastConfig.to_json`` refuses it, and `load` is to be given the configuration again.

    Attributes:
        sparsifies: Whether any parameter is sparse at all.
        explores: Whether the backward sparsity is read, and the exploration penalty in place.
        reads_gradient: Whether the sets follow the gradient of all weights.

    Example:
        Half of B∖A are the largest beyond A, half are drawn:

        >>> from topkast_func import TopKastConfig, compute_masks
        >>> @dataclass(frozen=True)
        ... class HalfDrawn(Method):
        ...     explores: ClassVar[bool] = True
        ...     def sets(self, situation):
        ...         more = (situation.backward - situation.forward) // 2
        ...         magnitudes = situation.scores.abs().flatten()
        ...         ranked = magnitudes.argsort(descending=True, stable=True)
        ...         start, end = situation.forward + more, situation.backward
        ...         order = torch.randperm(ranked.numel() - start, generator=situation.generator)
        ...         drawn = ranked[start:][order.to(ranked.device)][: end - start]
        ...         forward = torch.zeros_like(magnitudes, dtype=torch.bool)
        ...         forward[ranked[: situation.forward]] = True
        ...         backward = torch.zeros_like(forward)
        ...         backward[torch.cat((ranked[:start], drawn))] = True
        ...         return tuple(mask.view(situation.scores.shape) for mask in (forward, backward))
        >>> config = TopKastConfig(0.75, 0.25, method=HalfDrawn())
        >>> masks = compute_masks({"weight": torch.arange(8.0).view(1, 8)}, config)["weight"]
        >>> masks.forward.int().tolist(), int(masks.backward.sum())
        ([[0, 0, 0, 0, 0, 0, 1, 1]], 6)
    """

    sparsifies: ClassVar[bool] = True
    explores: ClassVar[bool] = False
    reads_gradient: ClassVar[bool] = False

    @property
    def enters_at(self) -> Entry:
        """How an entry that newly enters A starts."""
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
            1_A and 1_B, bool, of the shape of the scores, with as many entries as are asked for,
            in each group where there are groups, A within B. They are copied.

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
    nothing = torch.zeros_like(situation.scores, dtype=torch.bool)
    active = drawn_beside(nothing, 0, situation.forward, situation.generator, situation.group)
    return active, active
