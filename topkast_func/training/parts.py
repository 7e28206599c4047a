"""Which part of a state a rank has, where ranks divide it.

On the meta device is what other ranks own, or own parts of; see `Part`. So a state tells by itself
which part of it is here.
"""

from topkast_func.config import TopKastConfig
from topkast_func.distributed.owners import Owners
from topkast_func.storage.parted import active, compact_in, without
from topkast_func.storage.weights import Weights
from topkast_func.training.split import apart, at_rest, is_of, unsplit
from topkast_func.training.state import TrainState, elsewhere
from topkast_func.types import Tensors, changed

FOREIGN = (
    "this rank is to own {}, or as it may be a part of each, and the state has not: it is the part "
    "of another rank, of another group, or of a configuration that splits others; begin with a "
    "whole state, such as gather(state, process_group) returns"
)


def part(ranks: Owners, config: TopKastConfig, state: TrainState) -> TrainState:
    """Return the part of a state that a rank has, which may be the state already.

    Args:
        ranks: The processes.
        config: What it is trained with, by which sparse tensors may be split, or not.
        state: The state, whole or that part.

    Returns:
        The part: θ and slots of what other ranks own are on the meta device.

    Raises:
        ValueError: It is the part of another rank, or in dense storage.
    """
    weights = compact_in(state.weights)
    sizes = {name: shape.numel() for name, shape in weights.shapes().items()}
    others, away, split = (
        ranks.divide(sizes, unsplit(weights, config)),
        elsewhere(state),
        ranks.split(),
    )
    if lost := [name for name in away if not _is_here(ranks, state, name)]:
        raise ValueError(FOREIGN.format(lost))
    held = {*weights.theta, *split} | {n for t in state.optimizer.slots.values() for n in t}
    if len(away) == len(others & held):
        return state
    parts, left = apart(ranks, state, weights), without(weights, others)

    def elsewhere_too(name: str, kind: str) -> bool:
        return kind in parts[name].slots if name in parts else name in others

    slots = {
        kind: {n: slot.to("meta") if elsewhere_too(n, kind) else slot for n, slot in tree.items()}
        for kind, tree in state.optimizer.slots.items()
    }
    sparse = [name for name in split if name in weights.theta]
    own = ranks.own({name: weights.values[name] for name in sparse})
    held_after = left.values | ranks.put(own, {name: left.values[name] for name in sparse})
    return changed(
        state,
        weights=changed(left, values=held_after),
        optimizer=changed(state.optimizer, slots=slots),
        split=parts,
    )


def _is_here(ranks: Owners, state: TrainState, name: str) -> bool:
    """Return whether what a state lacks of a parameter is what other ranks own."""
    owner, part = ranks.owners[name], state.split.get(name)
    if part is None:
        return owner not in (None, ranks.rank)
    return owner is None and is_of(ranks.ranks, part)


def sent_by_owners(weights: Weights) -> Tensors:
    """Return what owners send of weights in compact storage: what the forward pass reads.

    Args:
        weights: The weights, without values too.

    Returns:
        Tensors by name.

    Raises:
        ValueError: They are in dense storage.
    """
    return active(compact_in(weights))


def compared(ranks: Owners, state: TrainState) -> TrainState:
    """Return what ranks compare of their parts, once what they alone have at rest is as it was.

    Values of B∖A and slots change at every step, by their owner alone: nothing checks them.

    Args:
        ranks: The processes.
        state: The part of this rank.

    Returns:
        The part with what all ranks read of the values, and checksums in the place of θ at rest.

    Raises:
        RuntimeError: θ at rest has changed; on every rank.
    """
    weights = compact_in(state.weights)
    sums = ranks.rested(at_rest(state), int(state.step))
    alike = {name: total for name, total in sums.items() if name not in state.split}
    slots = {
        kind: {name: slot for name, slot in tree.items() if not _is_split(state, name, kind)}
        for kind, tree in state.optimizer.slots.items()
    }
    return changed(
        state,
        weights=changed(weights, values=active(weights), theta=alike),
        optimizer=changed(state.optimizer, slots=slots),
        split={},
    )


def _is_split(state: TrainState, name: str, kind: str) -> bool:
    return name in state.split and kind in state.split[name].slots
