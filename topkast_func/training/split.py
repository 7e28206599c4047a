"""Parameters that all ranks divide: each has a range of θ at rest, and of values of B to move.

The values of A are on every rank, as of any parameter.
"""

import torch
from torch import Tensor

from topkast_func.config import TopKastConfig
from topkast_func.distributed.division import cut, part_of, piece, placed
from topkast_func.distributed.owners import Owners, from_owners
from topkast_func.distributed.ranks import Ranks
from topkast_func.methods.magnitude import Magnitude, TopKast
from topkast_func.storage.compact import CompactWeights
from topkast_func.storage.parted import compact_in
from topkast_func.storage.weights import Weights
from topkast_func.training.state import Part, TrainState
from topkast_func.types import Tensors, changed

LOST = "no rank of the group owns {}: gather by the group that the state was trained with"

RANKED = (Magnitude.sets, TopKast.sets)
"""How methods choose that rank magnitudes and do nothing else."""


def whole_by(config: TopKastConfig) -> str | None:
    """Say by what of a configuration no sparse tensor is split; None where they can be."""
    method = config.method
    if method.sparsifies and type(method).sets not in RANKED:
        return f"method={method}"
    if config.block_shape != (1, 1):
        return f"block_shape={config.block_shape}"
    if config.pattern is not None:
        return f"pattern={config.pattern!r}"
    if config.penalty == "group_l2" and method.explores:
        return "penalty='group_l2'"
    return None


def unsplit(weights: Weights, config: TopKastConfig) -> tuple[str, ...]:
    """Return the names of the parameters that are not split, whatever their size."""
    return weights.sparse_names if whole_by(config) else ()


def apart(ranks: Owners, state: TrainState, weights: CompactWeights) -> dict[str, Part]:
    """Return what this rank has of the parameters that are split, of a state that is whole."""
    found = {}
    for name in ranks.split():
        if name in state.split:
            found[name] = state.split[name]
            continue
        value, rest = weights.values[name], weights.theta.get(name, weights.values[name][:0])
        slots = {
            kind: piece(tree[name], *ranks.span(name, value.numel())).clone()
            for kind, tree in state.optimizer.slots.items()
            if name in tree and tree[name].shape == value.shape
        }
        theta = piece(rest.flatten(), *ranks.span(name, rest.numel())).clone()
        found[name] = Part(_place(ranks.ranks), theta, slots)
    return found


def check_parts(ranks: Ranks, state: TrainState) -> None:
    """Check that the ranks of a group have all parts of what is split; a collective call.

    Args:
        ranks: The processes.
        state: The state of this rank.

    Raises:
        ValueError: They have not; on every rank.
    """
    own = {name: is_of(ranks, part) for name, part in state.split.items()}
    told = ranks.told(own)
    names = dict.fromkeys(name for other in told for name in other)
    if lost := [name for name in names if not all(other.get(name) for other in told)]:
        raise ValueError(LOST.format(f"all parts of {lost}"))


def is_of(ranks: Ranks, part: Part) -> bool:
    """Return whether a part is that of this rank, of as many."""
    return torch.equal(part.place, _place(ranks))


def at_rest(state: TrainState) -> Tensors:
    """Return θ at rest by name, of what is split the range of this rank."""
    theta = state.weights.theta
    return theta | {name: state.split[name].theta for name in theta if name in state.split}


def joined(ranks: Ranks, state: TrainState) -> TrainState:
    """Return a state with what is split on every rank as a whole; a collective call."""
    if not state.split:
        return state
    weights, parts = compact_in(state.weights), state.split
    held, theta = dict(weights.values) | joined_values(ranks, state), dict(weights.theta)
    slots = {kind: dict(tree) for kind, tree in state.optimizer.slots.items()}
    for name, part in parts.items():
        if name in theta:
            shape, here = theta[name].shape, part.theta.to(held[name].device)
            theta[name] = joined_flat(ranks, here, shape.numel()).view(shape).to(part.theta.device)
        for kind, slot in part.slots.items():
            value = held[name]
            slots[kind][name] = joined_flat(ranks, slot, value.numel()).view(value.shape)
    return changed(
        state,
        weights=changed(weights, values=held, theta=theta),
        optimizer=changed(state.optimizer, slots=slots),
        split={},
    )


def joined_values(ranks: Ranks, state: TrainState) -> Tensors:
    """Return all values of B of the sparse parameters that are split."""
    held, theta = state.weights.values, state.weights.theta
    values = {name: held[name] for name in state.split if name in theta}
    bounds = [cut(value.numel(), ranks.size) for value in values.values()]
    return dict(zip(values, from_owners(ranks, bounds, [*values.values()]), strict=True))


def joined_flat(ranks: Ranks, own: Tensor, size: int) -> Tensor:
    """Return the flat tensor of which each rank has an equal part."""
    whole = placed(own, *part_of(size, ranks.rank, ranks.size), own.new_zeros(size))
    return from_owners(ranks, [cut(size, ranks.size)], [whole])[0]


def places_in(state: TrainState, name: str) -> tuple[Tensor, int]:
    """Return where the values of a sparse parameter stand, and how many entries it has."""
    weights = compact_in(state.weights)
    shape = weights.theta[name].shape
    return weights.sets(name).flat_index((1, 1), shape), shape.numel()


def _place(ranks: Ranks) -> Tensor:
    return torch.tensor([ranks.rank, ranks.size], device="cpu")
