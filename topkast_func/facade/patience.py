"""How long it may go on before it is said that nobody counts the steps of an optimiser."""

import math

from topkast_func.config import TopKastConfig
from topkast_func.facade.sparse_weight import SparseWeight
from topkast_func.methods.exchange import Static
from topkast_func.warn import warn_caller


def patience(config: TopKastConfig, step: int) -> float:
    """Return how many steps of an optimiser may go by before it is said that nobody counts them.

    Twice as many as there are between refreshes, at the least a few: an optimiser may wrap
    another, and both are heard of. Without refreshes nothing is amiss.
    """
    every = config.schedule.interval(step)
    stay = config.schedule.settled(step) or isinstance(config.method, Static)
    return math.inf if every is None or stay else max(2 * every, 10)


def say_that_it_is_forgotten(late: list[SparseWeight]) -> None:
    """Warn, once, of weights whose sets are overdue to be chosen anew."""
    for weight in late:
        weight.overdue = math.inf
    warn_caller(
        "the optimizer goes on and nobody calls sparsifier.step(): the sets are never chosen anew. "
        "Call it once after each optimizer.step(), or give the trainer its TopKastCallback; "
        "refresh_every=None leaves the sets to sparsifier.refresh()"
    )
