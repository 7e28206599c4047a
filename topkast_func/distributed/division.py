"""Who has what of the tensors that ranks divide: each has an owner, or all have a part of it."""

from collections.abc import Collection, Mapping
from functools import lru_cache
from heapq import heapreplace
from typing import TypeAlias

import torch
from torch import Tensor

SLACK = 1.1
"""How much more than a fair share of all entries a rank may have before tensors are split."""

Bounds: TypeAlias = tuple[int, ...]
"""Where a flat tensor is cut, ranks + 1 places: each rank has what is from its own to the next."""


def owners_of(
    sizes: Mapping[str, int], ranks: int, unsplit: Collection[str] = ()
) -> dict[str, int | None]:
    """Give each tensor an owner: the largest first, each to the rank that has least by then.

    Where a rank then has more than `SLACK` of a fair share, its largest tensor is split among all,
    and the others are given their owners anew.

    Args:
        sizes: Entries by name.
        ranks: How many ranks there are.
        unsplit: Names of tensors that have an owner whatever their size.

    Returns:
        Ranks by name, None where a tensor is split; the same wherever the arguments are.

    Example:
        >>> owners_of({"a": 3, "b": 5, "c": 2, "d": 1}, 2)
        {'a': 1, 'b': 0, 'c': 1, 'd': 0}
        >>> owners_of({"a": 3, "b": 9, "c": 2, "d": 1}, 2)
        {'a': 0, 'b': None, 'c': 1, 'd': 1}
    """
    return dict(_owners_of(tuple(sizes.items()), ranks, frozenset(unsplit)))


@lru_cache(maxsize=64)
def _owners_of(
    sizes: tuple[tuple[str, int], ...], ranks: int, unsplit: frozenset[str]
) -> dict[str, int | None]:
    left = dict(sizes)
    most = SLACK * sum(left.values()) / ranks
    while True:
        load, rank, owners = _dealt(left, ranks)
        mine = [n for n, own in owners.items() if own == rank and n not in unsplit]
        largest = max(mine, key=lambda name: left[name], default=None)
        split = sum(size for name, size in sizes if name not in left)
        if largest is None or left[largest] < ranks or load + split / ranks <= most:
            return {name: owners.get(name) for name, _ in sizes}
        del left[largest]


def _dealt(sizes: Mapping[str, int], ranks: int) -> tuple[int, int, dict[str, int]]:
    """Return the entries of the rank with most, that rank, and the owner of each tensor."""
    loads, owners = [(0, rank) for rank in range(ranks)], dict[str, int]()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, owners[name] = loads[0]
        heapreplace(loads, (load + sizes[name], owners[name]))
    return *max(loads), owners


def cut(size: int, ranks: int) -> Bounds:
    """Cut a flat tensor into as many equal parts as there are ranks."""
    return tuple(size * rank // ranks for rank in range(ranks + 1))


def part_of(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return where the part of a rank begins and ends of a flat tensor that is cut."""
    start, stop = cut(size, ranks)[rank : rank + 2]
    return start, stop


def piece(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return a tensor where that is all of it, else a part of the flat tensor, which may be [0]."""
    return tensor if stop - start == tensor.numel() else tensor.flatten()[start:stop]


def placed(own: Tensor, start: int, stop: int, tensor: Tensor) -> Tensor:
    """Return a tensor with ``own`` in the place of what `piece` returns of it."""
    if start == stop:
        return tensor
    flat = tensor.flatten()
    return torch.cat([flat[:start], own.flatten(), flat[stop:]]).view(tensor.shape)
