"""Bytes of a training in compact storage of which each tensor has an owner, or is split."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from topkast_func.distributed.division import owners_of, part_of
from topkast_func.training.optim import Optimizer
from topkast_func.training.parts import sent_by_owners
from topkast_func.training.state import Weights


class Share(NamedTuple):
    """Bytes of a parameter, or of several.

    Attributes:
        entries: How many there are, which owners balance.
        values: How many are stored: those of B, or of a dense parameter.
        theta: Bytes of θ at its owner, beside the values.
        slots: Bytes at its owner.
        gradient: Bytes of the values of B, or of a dense parameter, on every rank.
        alpha: Bytes of what its owner sends to the others: the values of A, or all of it.
    """

    entries: int
    values: int
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
    values, alpha = weights.values, sent_by_owners(weights)
    slots = optimizer.init(values).slots.values()
    return {
        name: Share(
            shape.numel(),
            values[name].numel(),
            bytes_of(weights.theta.get(name)),
            bytes_of([tree.get(name) for tree in slots]),
            values[name].nbytes,
            alpha[name].nbytes,
        )
        for name, shape in weights.shapes().items()
    }


def total(shares: Iterable[Share]) -> Share:
    """Return the bytes of several parameters."""
    return Share(*map(sum, zip(Share(0, 0, 0, 0, 0, 0), *shares, strict=True)))


def most(shares: Mapping[str, Share], ranks: int, unsplit: Collection[str]) -> Most:
    """Return the bytes of the rank with most, of so many; some tensors are never split."""
    owners = owners_of({name: share.entries for name, share in shares.items()}, ranks, unsplit)
    every, others = total(shares.values()), ranks - 1
    whole = [
        total(share for name, share in shares.items() if owners[name] == rank)
        for rank in range(ranks)
    ]
    split = [share for name, share in shares.items() if owners[name] is None]
    owned = [
        total([own, *(_part(share, rank, ranks) for share in split)])
        for rank, own in enumerate(whole)
    ]
    sent = [every.gradient - own.gradient + others * own.alpha for own in owned]
    received = [others * own.gradient + every.alpha - own.alpha for own in owned]
    theta, slots = [own.theta for own in owned], [own.slots for own in owned]
    both = map(sum, zip(theta, slots, strict=True))
    return Most(max(theta), max(slots), max(both), max(*sent, *received))


def _part(share: Share, rank: int, ranks: int) -> Share:
    """Return the bytes that a rank has of a parameter that is split."""
    first, end = part_of(share.entries, rank, ranks)
    start, stop = part_of(share.values, rank, ranks)
    theta, slots, gradient = (
        bytes // count
        for bytes, count in (
            (share.theta, share.entries),
            (share.slots, share.values),
            (share.gradient, share.values),
        )
    )
    count = stop - start
    alpha = min(stop * gradient, share.alpha) - min(start * gradient, share.alpha)
    return Share(end - first, count, (end - first) * theta, count * slots, count * gradient, alpha)


def bytes_of(tree: Any) -> int:
    """Return the bytes of the tensors of a tree."""
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
