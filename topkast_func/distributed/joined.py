"""What a step does for its ranks, by how they share a state."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from topkast_func.distributed.batches import Samples, rows
from topkast_func.distributed.models import averaged_buffers, check_unsynced
from topkast_func.distributed.owners import Owners
from topkast_func.distributed.parallel import Alone, DataParallel
from topkast_func.distributed.ranks import Ranks
from topkast_func.distributed.roll import calling

OWNERS = "owners"

Made = TypeVar("Made")


def made_alike(
    ranks: Ranks | None, where: str, make: Callable[[], tuple[Made, Mapping[str, Any]]]
) -> Made:
    """Make something on every rank; a collective call.

    Args:
        ranks: The processes; None for this one alone.
        where: Which call this is.
        make: Makes it, without the other ranks, and tells what must be alike on all of them, by
            what it is called.

    Returns:
        What it made.

    Raises:
        Exception: It failed on a rank, so that it fails on all; see `Ranks.attempted`.
        ValueError: The ranks differ.
        RuntimeError: A rank is elsewhere, or is lost.
    """
    if ranks is None:
        return make()[0]
    with calling(ranks, where):
        made, facts = ranks.attempted(make)
        ranks.check_alike(facts, where)
    return made


def data_parallel(
    ranks: Ranks | None, samples: Samples | None, shard: object, model: object
) -> Alone:
    """Return what a step does for its ranks.

    Args:
        ranks: The processes; None for this one alone.
        samples: See `make_train_step`.
        shard: See `make_train_step`.
        model: The model.

    Returns:
        What the step is to call.

    Raises:
        TypeError: ``samples`` is no function.
        ValueError: See `make_train_step`.
    """
    if shard not in (None, OWNERS):
        raise ValueError(f"shard must be {OWNERS!r} or None, got {shard!r}")
    if samples is not None and not callable(samples):
        raise TypeError(f"samples must be a function of the batch, got {samples!r}")
    if ranks is None:
        for name, given in (("samples", samples), ("shard", shard)):
            if given is not None:
                raise ValueError(f"{name} is for several processes: pass process_group or mesh too")
        return Alone()
    check_unsynced(model)
    if ranks.size == 1:
        return Alone()
    kind = DataParallel if shard is None else Owners
    return kind(ranks, samples or rows, tuple(averaged_buffers(model)))
