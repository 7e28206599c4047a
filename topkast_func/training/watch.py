"""Which states a step has found whole, so that it need not look at them again."""

from collections.abc import Hashable
from itertools import count
from typing import NamedTuple

from torch import Tensor

from topkast_func.reading import AsTheyAre, readable
from topkast_func.storage.weights import Weights
from topkast_func.training.state import TrainState
from topkast_func.training.whole import check_whole
from topkast_func.types import Params

MANY = 64
"""Looks of states that are kept: threads may train several at once."""


class _Known(NamedTuple):
    """Sets that were met: the tensors that hold them, and their number."""

    held: AsTheyAre
    number: Hashable


class Watch:
    """Asks `check_whole` of a state where its sets are others, or it looks otherwise, than before.

    Sets are known by the tensors that hold them, as long as nobody writes to them, and not by their
    numbers, which take time to read.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], _Known] = {}
        self._numbers = count()
        self._whole: set[Hashable] = set()

    def look(self, state: TrainState) -> Hashable:
        """Check a state.

        Args:
            state: The state.

        Returns:
            A key that differs between states of which one may agree, and the other not, with
            whatever else.

        Raises:
            TypeError: See `check_whole`.
            ValueError: See `check_whole`.
        """
        found = self._key(state)
        if found not in self._whole:
            check_whole(state)
            self._whole = {found, *self._whole} if len(self._whole) < MANY else {found}
        return found

    def follow(self, before: TrainState, after: TrainState) -> None:
        """Let the sets that a step has chosen be known in the place of those that it chose from."""
        number, old = self._number(before.weights), tuple(map(id, before.weights.set_tensors))
        self._known = {key: known for key, known in self._known.items() if key != old}
        self._meet(after.weights.set_tensors, number)

    def _key(self, state: TrainState) -> Hashable:
        try:
            return looks(state), self._number(state.weights)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            check_whole(state)
            raise

    def _number(self, weights: Weights) -> Hashable:
        held = weights.set_tensors
        known = self._known.get(tuple(map(id, held)))
        if known and None not in known.held.versions and known.held.are(held):
            return known.number
        if not all(map(readable, held)):  # vmap wraps them anew at each call
            return tuple([tensor.shape for tensor in held])
        return self._meet(held, next(self._numbers))

    def _meet(self, held: list[Tensor], number: Hashable) -> Hashable:
        alive = {
            key: known
            for key, known in self._known.items()
            if all(one() is not None for one in known.held.references)
        }
        self._known = {**alive, tuple(map(id, held)): _Known(AsTheyAre.of(held), number)}
        return number


def looks(state: TrainState) -> Hashable:
    """Return a key that differs between states of which one may be whole, and the other not."""
    weights, slots = state.weights, state.optimizer.slots
    trees = [weights.values, state.frozen, state.buffers, state.narrow, *slots.values()]
    trees += [part.slots for part in state.split.values()]
    return (
        (type(weights), tuple(slots), tuple(state.split)),
        tuple([(name, a.dtype, float(a)) for name, a in state.exponents.items()]),
        None if weights.theta is weights.values else _kinds(weights.theta),
        tuple([_kinds(tree) for tree in trees]),
    )


def _kinds(tensors: Params) -> Hashable:
    return tuple(tensors), tuple([(t.shape, t.dtype, t.device, t.layout) for t in tensors.values()])
