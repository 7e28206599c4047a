"""The roll call by which ranks see, before they send anything else, that all make the same call.

It goes over a group of its own, of the same processes: so what one of them sends over the group
that it trains with, in a collective of the caller's say, is not taken for its answer.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from topkast_func.distributed.launched import world
from topkast_func.distributed.ranks import Ranks

WIDTH = 4
"""How many numbers a rank may tell in its row."""

BROKEN = (
    "a rank that catches an error of train_step cannot go on without the others: end the process, "
    "and begin again on all ranks, from a checkpoint"
)
APART = (
    "{}: {}. All ranks are to make the same calls in the same order: one without further batches "
    f"is to give empty ones, and {BROKEN}"
)

GONE = (
    "the process group is there no more, as after destroy_process_group: make another, and a step "
    "with it, on all ranks"
)

_KNOWN: WeakKeyDictionary[Any, dict[tuple[int, ...], Ranks]] = WeakKeyDictionary()
"""The groups over which rolls are called, by their processes; gone with the group of all."""

_MADE: Counter[tuple[int, ...]] = Counter()
"""How often processes have made a group of their own, by who they are."""


def with_own_group(ranks: Ranks) -> Ranks:
    """Return the same processes with a group of their own, of gloo; a collective call.

    Torch names such a group after its members and how many groups a process is in, so that those
    that are in fewer than others are first put into groups of their own.
    """
    members, patience = dist.get_process_group_ranks(ranks.group), ranks.patience()
    own = dist.get_rank()
    for _ in range(_most(members, own, patience) - _groups()):
        dist.new_group([own], backend="gloo", use_local_synchronization=True)
    group = dist.new_group(members, patience, backend="gloo", use_local_synchronization=True)
    return Ranks(group)


def _groups() -> int:
    return len(dist.distributed_c10d._world.pg_names)


def _most(members: list[int], own: int, patience: timedelta | None) -> int:
    """Return in how many groups the process is that is in most of them, over the store of all."""
    _MADE[tuple(members)] += 1
    key = f"topkast_func/{members}/{_MADE[tuple(members)]}"
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{key}/{own}", str(_groups()))
    keys = [f"{key}/{member}" for member in members]
    store.wait(keys, *([] if patience is None else [patience]))
    return max(int(store.get(name)) for name in keys)


@contextmanager
def calling(ranks: Ranks, where: str) -> Iterator[None]:
    """Begin a collective call, once all ranks are found to begin it; see `Ranks.waiting`.

    Args:
        ranks: The processes.
        where: Which call this is, and at which step, such as "in gather at step 7".

    Yields:
        Nothing.

    Raises:
        RuntimeError: A rank is elsewhere, the same on every rank; or is lost.
    """
    with ranks.waiting(where):
        call_roll(ranks, where)
        yield


def call_roll(ranks: Ranks, where: str, told: Sequence[int] = ()) -> Tensor:
    """Check that all ranks are about to do the same, and return what each tells.

    Args:
        ranks: The processes.
        where: See `calling`.
        told: Up to `WIDTH` numbers, as many on all ranks that are there.

    Returns:
        The numbers, int64, [ranks, numbers].

    Raises:
        RuntimeError: A rank is elsewhere; the same on every rank.
    """
    blank = [0] * (WIDTH - len(told))
    row = torch.tensor([digest(where), *told, *blank], dtype=torch.int64, device="cpu")
    if ranks.size == 1:
        return row[None, 1 : 1 + len(told)]
    line = _line(ranks)
    rows = line.gathered(row)
    if (rows[:, 0] != rows[0, 0]).any():
        places: dict[str, list[int]] = {}
        for rank, place in enumerate(line.told(where)):
            places.setdefault(place, []).append(rank)
        found = " and ".join(_told(members, place) for place, members in places.items())
        raise RuntimeError(APART.format(f"rank {ranks.rank} of {ranks.size}, {where}", found))
    return rows[:, 1 : 1 + len(told)]


def digest(value: object) -> int:
    """Return a number that stands for a value, by how it prints."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")


def _line(ranks: Ranks) -> Ranks:
    """Return the processes with the group over which they call the roll."""
    if ranks.group not in dist.distributed_c10d._world.pg_map:
        raise RuntimeError(GONE)
    known = _KNOWN.setdefault(world(), {})
    members = tuple(dist.get_process_group_ranks(ranks.group))
    if members not in known:
        known[members] = with_own_group(ranks)
    return known[members]


def _told(members: list[int], place: str) -> str:
    who = f"rank {members[0]} is" if len(members) == 1 else f"ranks {members} are"
    return f"{who} {place}"
