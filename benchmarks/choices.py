"""Whole steps with the engines that ``auto`` picks, beside one engine for all layers."""

from itertools import product

from benchmarks.protocol import Arm, Case
from benchmarks.steps import USUAL, Pair, ours, shown

ENGINES = ("auto", "numba", "dense")
"""The choice, and what it chooses between where nothing else is fast."""

NETWORKS = (("mlp-784", 128), ("mlp-784", 32), ("mlp-1024", 256), ("encoder", 16))
"""With their batches."""

PAIRS: tuple[Pair, ...] = ((0.5, 0.2), (0.65, 0.5), (0.8, 0.5), USUAL)
"""Below, near and above the sparsities at which the kernels begin to win."""


def cases(full: bool) -> list[Case]:
    """Return one case for each network, batch and pair of sparsities.

    Args:
        full: All of them; a quick run has the first.

    Returns:
        The cases.
    """
    found = [
        Case(f"{network}, batch {batch}, {shown(pair)}", _arms(network, batch, pair))
        for (network, batch), pair in product(NETWORKS, PAIRS)
    ]
    return found if full else found[:1]


def _arms(network: str, batch: int, pair: Pair) -> tuple[Arm, ...]:
    arms = (ours(network, pair, batch=batch, engine=engine) for engine in ENGINES)
    return tuple(arm._replace(name=arm.parameters["engine"]) for arm in arms)
