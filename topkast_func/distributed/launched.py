"""The processes that torchrun started, where it did: their group, and the rows of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from topkast_func.distributed.ranks import Ranks


@contextmanager
def launched() -> Iterator[None]:
    """Join the processes that torchrun started with this one, if it did, and leave them after."""
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def world() -> dist.ProcessGroup | None:
    """Return the group of all processes; None where there is one alone."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def is_first() -> bool:
    """Return whether this process is rank 0, which prints and writes the results, or runs alone."""
    return Ranks(world()).rank == 0


def own_rows(samples: list[Any]) -> Any:
    """Collate the samples of this rank out of r: every r-th of a batch, from its own number on.

    Args:
        samples: Those of the batch, the same on all ranks.

    Returns:
        The batch of this rank, which has no row where there are fewer samples than ranks.
    """
    ranks = Ranks(world())
    return tree_map(lambda rows: rows[ranks.rank :: ranks.size], default_collate(samples))
