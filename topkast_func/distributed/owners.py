"""Owners: each tensor is moved by one rank, or split among all, which send what others read of it.

What a rank sends to another is one bucket per dtype, as long as what there is for it: the bytes on
the way are those of a ring, without padding.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from topkast_func.distributed.batches import Samples
from topkast_func.distributed.bucket import by_dtype, like, real, weighted
from topkast_func.distributed.checksums import Rest
from topkast_func.distributed.division import Bounds, cut, owners_of, piece, placed
from topkast_func.distributed.parallel import DataParallel, Found
from topkast_func.distributed.ranks import Ranks
from topkast_func.kernels.copied import copied
from topkast_func.types import Tensors, changed


class Owners(DataParallel):
    """One process of several that each own some of the tensors; see `make_train_step`.

    Attributes:
        owners: Ranks by the names of the tensors that they own; None for those that are split.
    """

    owners: dict[str, int | None]

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

    def divide(self, sizes: Mapping[str, int], unsplit: Collection[str]) -> set[str]:
        """Give each tensor an owner, or all; return the names of what this rank has not whole."""
        self.owners = owners_of(sizes, self.ranks.size, unsplit)
        return {name for name in sizes if self.owners[name] != self.rank}

    def split(self) -> list[str]:
        """Return the names of the tensors that are split among all ranks."""
        return [name for name, owner in self.owners.items() if owner is None]

    def bounds(self, name: str, size: int) -> Bounds:
        """Return what each rank has of the entries of a tensor, or of its values."""
        owner, ranks = self.owners[name], self.ranks.size
        if owner is None:
            return cut(size, ranks)
        return (0,) * (owner + 1) + (size,) * (ranks - owner)

    def span(self, name: str, size: int) -> tuple[int, int]:
        """Return where what this rank has of a tensor begins and ends."""
        start, stop = self.bounds(name, size)[self.rank : self.rank + 2]
        return start, stop

    def own(self, tensors: Tensors) -> Tensors:
        """Return what this rank has of tensors; see `piece`."""
        return {n: piece(t, *self.span(n, t.numel())) for n, t in tensors.items()}

    def put(self, own: Tensors, tensors: Tensors) -> Tensors:
        """Return tensors with others in the place of what `own` returns of them."""
        return {n: placed(own[n], *self.span(n, t.numel()), t) for n, t in tensors.items()}

    def whole(self, share: Tensor, own: Found, before: Tensors) -> Found:
        """Return what the whole batch has, the gradients of what this rank has alone."""
        found = super().whole(share, changed(own, grads={}), before)
        bounds = [self.bounds(name, grad.numel()) for name, grad in own.grads.items()]
        means = mean_at(self.ranks, bounds, share.reshape(()), list(own.grads.values()))
        return changed(found, grads=dict(zip(own.grads, means, strict=True)))

    def shared(self, tensors: Tensors, values: Tensors) -> Tensors:
        """Return the first entries of values as their owners have them.

        Args:
            tensors: These entries by name; of those of others the shapes alone are read.
            values: All of the values.

        Returns:
            The entries, the same on all ranks.
        """
        bounds = [
            tuple(min(bound, first.numel()) for bound in self.bounds(name, values[name].numel()))
            for name, first in tensors.items()
        ]
        return dict(zip(tensors, from_owners(self.ranks, bounds, [*tensors.values()]), strict=True))

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks."""
        total = tensor.clone()
        dist.all_reduce(total, group=self.ranks.group)
        return total


def mean_at(
    ranks: Ranks, bounds: Sequence[Bounds], share: Tensor, tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Do what `mean_over` does, each tensor where its owners have it.

    Args:
        ranks: The processes.
        bounds: What each rank has of each tensor.
        share: See `mean_over`.
        tensors: See `mean_over`.

    Returns:
        The means of what this rank has, see `piece`, summed in the order of the ranks.
    """
    found: dict[int, Tensor] = {}
    for places in by_dtype([real(tensor) for tensor in tensors]):
        groups = _by_owner(places, bounds)
        parts = [[_numbers(tensors[p], *span) for p, span in group] for group in groups]
        counts = [sum(part.numel() for part in own) for own in parts]
        bucket, own = weighted(torch.cat([*chain(*parts)]), share), counts[ranks.rank]
        came = bucket.new_empty(ranks.size * own)
        dist.all_to_all_single(came, bucket, [own] * ranks.size, counts, group=ranks.group)
        means = torch.split(
            came.view(ranks.size, own).sum(0), [part.numel() for part in parts[ranks.rank]]
        )
        for (place, span), mean in zip(groups[ranks.rank], means, strict=True):
            found[place] = like(mean, piece(tensors[place], *span))
    return [found.get(place, tensor.flatten()[:0]) for place, tensor in enumerate(tensors)]


def from_owners(ranks: Ranks, bounds: Sequence[Bounds], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Give each rank all tensors, as their owners have them.

    Args:
        ranks: The processes.
        bounds: What each rank has of each tensor.
        tensors: Of the same shapes and dtypes on every rank.

    Returns:
        Those of the owners.
    """
    found: dict[int, list[Tensor]] = {place: [] for place in range(len(tensors))}
    for places in by_dtype([real(tensor) for tensor in tensors]):
        groups = _by_owner(places, bounds)
        sizes = [
            [(stop - start) * (1 + tensors[p].is_complex()) for p, (start, stop) in group]
            for group in groups
        ]
        mine = [_numbers(tensors[p], *span) for p, span in groups[ranks.rank]]
        bucket = torch.cat(mine) if mine else _numbers(tensors[places[0]], 0, 0)
        counts, own = [sum(group) for group in sizes], [bucket.numel()] * ranks.size
        came = bucket.new_empty(sum(counts))
        dist.all_to_all_single(came, bucket.repeat(ranks.size), counts, own, group=ranks.group)
        ordered = [place for group in groups for place, _ in group]
        for place, part in zip(ordered, torch.split(came, [*chain(*sizes)]), strict=True):
            found[place].append(part)
    return [_put_together(found[place], tensor) for place, tensor in enumerate(tensors)]


def _put_together(parts: Sequence[Tensor], tensor: Tensor) -> Tensor:
    """Return the parts of a tensor in its shape, copied; it has none where it is empty."""
    if not parts:
        return tensor
    return like(torch.cat([*parts]) if len(parts) > 1 else copied(parts[0]), tensor)


def _numbers(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return a part of a flat tensor, of complex numbers as pairs of real ones."""
    return real(tensor.flatten()[start:stop]).flatten()


def _by_owner(
    places: Sequence[int], bounds: Sequence[Bounds]
) -> list[list[tuple[int, tuple[int, int]]]]:
    """Return by rank the places of the tensors that it has, and where its parts begin and end."""
    spans = {place: [*pairwise(bounds[place])] for place in places}
    return [
        [(place, spans[place][rank]) for place in places if len(range(*spans[place][rank]))]
        for rank in range(len(bounds[places[0]]) - 1)
    ]
