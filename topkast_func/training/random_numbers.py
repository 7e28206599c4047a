"""Random numbers of a step: drawn from its state, whatever the caller's generators say."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from topkast_func.training.state import TrainState
from topkast_func.turns import NO_RANDOM_NUMBERS, RANDOM_NUMBERS, Claims, require

Result = TypeVar("Result")


class Draws:
    """Remembers which kinds of work draw random numbers, as they are found out.

    Args:
        first: What the first work of a kind claims.
        rank: The process of several that does it.
        alone: Whether there are no others, with whom a turn that begins again would be out of step.
    """

    def __init__(self, first: Claims, rank: int = 0, alone: bool = True) -> None:
        self._first, self._rank, self._alone = first, rank, alone
        self._found: dict[Hashable, bool] = {}

    def claims(self, kind: Hashable) -> Claims:
        """Return the claims of a kind of work, the model apart.

        Args:
            kind: What decides whether it draws, and whether it is compiled anew.

        Returns:
            The claim.
        """
        found = self._found.get(kind)
        if found is None or not self._alone:
            return self._first
        return RANDOM_NUMBERS if found else NO_RANDOM_NUMBERS

    def run(self, kind: Hashable, state: TrainState, work: Callable[[], Result]) -> Result:
        """Do work within a turn, with the random numbers of a state if it draws any.

        A turn with too few claims begins again, and so does one in which the work turns out to
        draw.

        Args:
            kind: Kind of the work.
            state: The state.
            work: A pure function.

        Returns:
            What it returns.
        """
        claims = self.claims(kind)
        require(claims)
        if claims != NO_RANDOM_NUMBERS:
            with random_numbers_of(state, self._rank) as drawn:
                result = work()
                self._found[kind] = self._found.get(kind, False) or drawn()
            return result
        generators = _generators(state)
        before = [generator.get_state() for generator in generators]
        result = work()
        if _differ(generators, before):
            for generator, start in zip(generators, before, strict=True):
                generator.set_state(start)
            self._found.pop(kind)
            require(self._first)
        return result


@contextmanager
def random_numbers_of(state: TrainState, rank: int = 0) -> Iterator[Callable[[], bool]]:
    """Draw the random numbers of a step, and leave the caller's generators as they are.

    Args:
        state: The state; its seed, its step and the calls of its optimiser decide.
        rank: The process of several that draws them; each has its own.

    Yields:
        A function that tells whether any have been drawn.
    """
    entropy = (int(state.seed), int(state.step), int(state.optimizer.step))
    chance = np.random.SeedSequence(entropy, spawn_key=(rank,) if rank else ())
    seed = int(chance.generate_state(1)[0])
    generators = _generators(state)
    with torch.random.fork_rng(devices=[g.device.index for g in generators[1:]]):
        before = [generator.manual_seed(seed).get_state() for generator in generators]
        yield lambda: _differ(generators, before)


def _generators(state: TrainState) -> list[torch.Generator]:
    """Return the generators of the process that a step may draw from, that of the CPU first."""
    device = next(iter(state.weights.values.values())).device
    own = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
    return [torch.default_generator, *own]


def _differ(generators: list[torch.Generator], before: list[Tensor]) -> bool:
    pairs = zip(generators, before, strict=True)
    return not all(torch.equal(generator.get_state(), start) for generator, start in pairs)
