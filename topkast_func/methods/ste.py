"""Straight-through magnitude training: Top-KAST where everything learns."""

from dataclasses import dataclass
from typing import ClassVar

from topkast_func.methods.base import Method
from topkast_func.methods.topkast import TopKast
from topkast_func.sparsity import Allocation


@dataclass(frozen=True)
class StraightThrough(TopKast):
    """See `ste`; what it computes with is chosen as in Top-KAST."""

    explores: ClassVar[bool] = False

    def sparsities(self, asked: Allocation, step: int) -> Allocation:
        """Let B be everything."""
        return Allocation(asked.forward, 0.0)


def ste() -> Method:
    """Choose A by magnitude and train every weight, without a penalty.

    The gradient at α passes straight through to all of θ (Bengio et al., 2013, arXiv 1308.3432;
    as "STE" in JaxPruner, Lee et al., 2023). ``backward_sparsity`` is not read. Usually with
    ``refresh_every=1``.

    Returns:
        The method.
    """
    return StraightThrough()
