"""Owners: each tensor is moved by one rank, which sends what the others read of it.

What a rank sends to another is one bucket per dtype, as long as what there is for it: the bytes on
the way are those of a ring, without padding.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from heapq import heapreplace

import torch
import torch.distributed as dist
from torch import Tensor

from topkast_func.distributed.batches import Samples
from topkast_func.distributed.bucket import by_dtype, like, real, weighted
from topkast_func.distributed.checksums import Rest
from topkast_func.distributed.parallel import DataParallel, Found
from topkast_func.distributed.ranks import Ranks
from topkast_func.types import Tensors, changed


def owners_of(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Give each tensor an owner: the largest first, each to the rank that has least by then.

    Args:
        sizes: Entries by name.
        ranks: How many ranks there are.

    Returns:
        Ranks by name, the same wherever the arguments are.

    Example:
        >>> owners_of({"a": 3, "b": 5, "c": 2, "d": 1}, 2)
        {'a': 1, 'b': 0, 'c': 1, 'd': 0}
    """
    loads, owners = [(0, rank) for rank in range(ranks)], dict[str, int]()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, owners[name] = loads[0]
        heapreplace(loads, (load + sizes[name], owners[name]))
    return {name: owners[name] for name in sizes}


class Owners(DataParallel):
    """One process of several that each own some of the tensors; see `make_train_step`.

    Attributes:
        owners: Ranks by the names of the tensors that they own.
    """

    owners: dict[str, int]

    def __init__(self, ranks: Ranks, samples: Samples, averaged: tuple[str, ...]) -> None:
        super().__init__(ranks, samples, averaged)
        self._rest = Rest()

    def rested(self, tensors: Tensors, step: int) -> Tensors:
        """Return the checksums of what only owners hold; see `Rest`. A collective call.

        Args:
            tensors: See `Rest.checked`.
            step: Number of the step, for the error.

        Returns:
            See `Rest.checked`.

        Raises:
            RuntimeError: A tensor has changed; on every rank.
        """
        where = f"rank {self.rank} of {self.ranks.size}, step {step}"
        return self.ranks.attempted(partial(self._rest.checked, tensors, where))

    def divide(self, sizes: Mapping[str, int]) -> set[str]:
        """Give each tensor an owner, and return the names of those of other ranks."""
        self.owners = owners_of(sizes, self.ranks.size)
        return {name for name in sizes if not self.owns(name)}

    def owns(self, name: str) -> bool:
        """Return whether this rank owns a tensor."""
        return self.owners[name] == self.rank

    def own(self, tensors: Tensors) -> Tensors:
        """Return tensors, those of other ranks with no entry."""
        return {n: t if self.owns(n) else nothing(t) for n, t in tensors.items()}

    def whole(self, share: Tensor, own: Found, before: Tensors) -> Found:
        """Return what the whole batch has, the gradients of the tensors of this rank alone."""
        found = super().whole(share, changed(own, grads={}), before)
        owners, grads = [self.owners[name] for name in own.grads], list(own.grads.values())
        means = mean_at(self.ranks, owners, share.reshape(()), grads)
        return changed(found, grads=dict(zip(own.grads, means, strict=True)))

    def shared(self, tensors: Tensors) -> Tensors:
        """Return tensors as their owners have them; the others need their shapes alone."""
        owners = [self.owners[name] for name in tensors]
        return dict(zip(tensors, from_owners(self.ranks, owners, [*tensors.values()]), strict=True))

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks."""
        total = tensor.clone()
        dist.all_reduce(total, group=self.ranks.group)
        return total


def nothing(tensor: Tensor) -> Tensor:
    """Return the tensor without an entry: [0]."""
    return tensor.flatten()[:0]


def mean_at(
    ranks: Ranks, owners: Sequence[int], share: Tensor, tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Do what `mean_over` does, each tensor at its owner alone.

    Args:
        ranks: The processes.
        owners: The owner of each tensor.
        share: See `mean_over`.
        tensors: See `mean_over`.

    Returns:
        The means of what this rank owns, summed in the order of the ranks; [0] of the others.
    """
    flat = [real(tensor).flatten() for tensor in tensors]
    found: dict[int, Tensor] = {}
    for places in by_dtype(flat):
        groups = _by_owner(places, owners, ranks.size)
        counts = [sum(flat[place].numel() for place in group) for group in groups]
        ordered = [flat[place] for group in groups for place in group]
        bucket, own = weighted(torch.cat(ordered), share), counts[ranks.rank]
        came = bucket.new_empty(ranks.size * own)
        dist.all_to_all_single(came, bucket, [own] * ranks.size, counts, group=ranks.group)
        mine = groups[ranks.rank]
        means = came.view(ranks.size, own).sum(0)
        found |= zip(mine, torch.split(means, [flat[p].numel() for p in mine]), strict=True)
    return [
        like(found[place], tensor) if place in found else nothing(tensor)
        for place, tensor in enumerate(tensors)
    ]


def from_owners(ranks: Ranks, owners: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Give each rank all tensors, as their owners have them.

    Args:
        ranks: The processes.
        owners: The owner of each tensor.
        tensors: Of the same shapes and dtypes on every rank.

    Returns:
        Those of the owners.
    """
    flat = [real(tensor).flatten() for tensor in tensors]
    found: dict[int, Tensor] = {}
    for places in by_dtype(flat):
        groups = _by_owner(places, owners, ranks.size)
        counts = [sum(flat[place].numel() for place in group) for group in groups]
        mine = [flat[place] for place in groups[ranks.rank]]
        bucket = torch.cat(mine) if mine else nothing(flat[places[0]])
        came = bucket.new_empty(sum(counts))
        own = [bucket.numel()] * ranks.size
        dist.all_to_all_single(came, bucket.repeat(ranks.size), counts, own, group=ranks.group)
        ordered = [place for group in groups for place in group]
        parts = torch.split(came, [flat[place].numel() for place in ordered])
        found |= zip(ordered, parts, strict=True)
    return [like(found[place], tensor) for place, tensor in enumerate(tensors)]


def _by_owner(places: Sequence[int], owners: Sequence[int], ranks: int) -> list[list[int]]:
    return [[place for place in places if owners[place] == rank] for rank in range(ranks)]
