"""Gradual magnitude pruning: from dense to sparse along a cubic."""

from dataclasses import dataclass
from typing import ClassVar

from topkast_func.methods.base import Method
from topkast_func.methods.topkast import TopKast
from topkast_func.sparsity import Allocation, Staged, cubic_fractions


@dataclass(frozen=True)
class GradualPruning(TopKast):
    """See `gmp`; what it computes with is chosen as in Top-KAST.

    Attributes:
        begin: Step at which pruning begins.
        end: Step from which on the sparsity is final.
        stages: How many times the sparsity changes.
    """

    begin: int
    end: int
    stages: int
    explores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the steps."""
        self._shares()

    def sparsities(self, asked: Allocation, step: int) -> Allocation:
        """Return the share of the forward sparsity that is reached at the step, twice."""
        reached = asked.forward * self._shares().at(step)
        return Allocation(reached, reached)

    def starts(self) -> tuple[int, ...]:
        """Return the steps at which a stage begins."""
        return self._shares().steps[1:]

    def _shares(self) -> Staged:
        fractions = cubic_fractions(self.begin, self.end, self.stages)
        return Staged(tuple(fractions), tuple(fractions.values()))


def gmp(begin: int, end: int, stages: int = 7) -> Method:
    """Prune by magnitude, gradually, from dense to ``forward_sparsity``.

    Zhu and Gupta, "To prune, or not to prune", 2017: the sparsity rises along a cubic, see
    `cubic`; what is pruned keeps its value and learns no more.

    Args:
        begin: Step at which pruning begins, at least 0.
        end: Step from which on the sparsity is ``forward_sparsity``, after ``begin``.
        stages: How many times the sparsity changes; `train_step` compiles for each.

    Returns:
        The method.

    Raises:
        TypeError: An argument is no integer.
        ValueError: An argument is out of range.
    """
    return GradualPruning(begin, end, stages)
