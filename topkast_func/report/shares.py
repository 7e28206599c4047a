"""Bytes of a training in compact storage of which each tensor has an owner."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from topkast_func.distributed.owners import owners_of
from topkast_func.training.optim import Optimizer
from topkast_func.training.owned import sent_by_owners
from topkast_func.training.state import Weights


class Share(NamedTuple):
    """Bytes of a parameter, or of several.

    Attributes:
        entries: How many there are, which owners balance.
        theta: Bytes of θ at its owner, beside the values.
        slots: Bytes at its owner.
        gradient: Bytes of the values of B, or of a dense parameter, on every rank.
        alpha: Bytes of what its owner sends to the others: the values of A, or all of it.
    """

    entries: int
    theta: int
    slots: int
    gradient: int
    alpha: int


class Most(NamedTuple):
    """Bytes of the rank with most.

    Attributes:
        theta: Of θ that it owns.
        slots: Of slots that it owns.
        both: Of both, which need not be the sum: different ranks may have most of each.
        sent: Of gradients and α that it sends in a step, or receives.
    """

    theta: int
    slots: int
    both: int
    sent: int


def shares_of(weights: Weights, optimizer: Optimizer) -> dict[str, Share]:
    """Return the bytes of each parameter by name."""
    values, alpha = weights.values(), sent_by_owners(weights)
    slots = optimizer.init(values).slots.values()
    return {
        name: Share(
            shape.numel(),
            bytes_of(weights.theta.get(name)),
            bytes_of([tree.get(name) for tree in slots]),
            values[name].nbytes,
            alpha[name].nbytes,
        )
        for name, shape in weights.shapes().items()
    }


def total(shares: Iterable[Share]) -> Share:
    """Return the bytes of several parameters."""
    return Share(*map(sum, zip(Share(0, 0, 0, 0, 0), *shares, strict=True)))


def most(shares: Mapping[str, Share], ranks: int) -> Most:
    """Return the bytes of the rank with most, of so many."""
    owners = owners_of({name: share.entries for name, share in shares.items()}, ranks)
    every, others = total(shares.values()), ranks - 1
    owned = [
        total(share for name, share in shares.items() if owners[name] == rank)
        for rank in range(ranks)
    ]
    sent = [every.gradient - own.gradient + others * own.alpha for own in owned]
    received = [others * own.gradient + every.alpha - own.alpha for own in owned]
    theta, slots = [own.theta for own in owned], [own.slots for own in owned]
    both = map(sum, zip(theta, slots, strict=True))
    return Most(max(theta), max(slots), max(both), max(*sent, *received))


def bytes_of(tree: Any) -> int:
    """Return the bytes of the tensors of a tree."""
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
