"""What a step does for its ranks, by how they share a state."""

from collections.abc import Mapping
from typing import Any

from topkast_func.distributed.batches import Samples, rows
from topkast_func.distributed.models import about, averaged_buffers, check_unsynced
from topkast_func.distributed.owners import Owners
from topkast_func.distributed.parallel import Alone, DataParallel
from topkast_func.distributed.ranks import ranks_of
from topkast_func.distributed.roll import calling

OWNERS = "owners"


def data_parallel(
    process_group: object,
    mesh: object,
    samples: Samples | None,
    shard: object,
    model: object,
    facts: Mapping[str, Any],
) -> Alone:
    """Return what a step does for its ranks; it is a collective call.

    Args:
        process_group: See `make_train_step`.
        mesh: See `make_train_step`.
        samples: See `make_train_step`.
        shard: See `make_train_step`.
        model: The model.
        facts: What must be alike on all ranks, by what it is called.

    Returns:
        What the step is to call.

    Raises:
        TypeError: The group, the mesh or ``samples`` is none.
        ValueError: See `make_train_step`.
    """
    if shard not in (None, OWNERS):
        raise ValueError(f"shard must be {OWNERS!r} or None, got {shard!r}")
    ranks = ranks_of(process_group, mesh)
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
    with calling(ranks, "in make_train_step"):
        ranks.check_alike({**facts, "shard": shard, **about(model)}, "in make_train_step")
    kind = DataParallel if shard is None else Owners
    return kind(ranks, samples or rows, tuple(averaged_buffers(model)))
