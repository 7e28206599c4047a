"""Straight-through magnitude training: Top-KAST where everything learns."""

from dataclasses import dataclass

from topkast_func.methods.base import Method
from topkast_func.methods.topkast import TopKast
from topkast_func.sparsity import Fixed


@dataclass(frozen=True)
class StraightThrough(Method):
    """See `ste`."""

    def sparsities(self, forward: Fixed, backward: Fixed, step: int) -> tuple[Fixed, Fixed]:
        """Let B be everything."""
        return forward, 0.0

    def settled(self) -> Method:
        """Rank as Top-KAST does."""
        return TopKast()


def ste() -> Method:
    """Choose A by magnitude and train every weight, without a penalty.

    The gradient at α passes straight through to all of θ (Bengio et al., 2013, arXiv 1308.3432;
    as "STE" in JaxPruner, Lee et al., 2023). ``backward_sparsity`` is not read. Usually with
    ``refresh_every=1``.

    Returns:
        The method.
    """
    return StraightThrough()
