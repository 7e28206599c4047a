"""States of many processes on disk: checkpoints in a folder, each whole or not there."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from topkast_func.checks import check_count, check_type
from topkast_func.config import TopKastConfig
from topkast_func.distributed.background import in_background
from topkast_func.distributed.launched import world
from topkast_func.distributed.ranks import Ranks
from topkast_func.distributed.roll import calling
from topkast_func.files.container import damage_of
from topkast_func.files.drafts import path_of
from topkast_func.files.layout import storable
from topkast_func.reading import check_numbers
from topkast_func.training.checkpoint import agreed, put_together, taken_apart
from topkast_func.training.in_ranges import up_to_date
from topkast_func.training.optim import Optimizer, check_optimizer
from topkast_func.training.pieces import with_pieces, without_pieces
from topkast_func.training.split import check_parts
from topkast_func.training.state import TrainState, check_one
from topkast_func.training.stored import stored
from topkast_func.types import Model, Tensors


def save_sharded(
    state: TrainState,
    folder: str | os.PathLike[str],
    config: TopKastConfig | None = None,
    *,
    keep: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a state by all ranks of a group, each a part; a collective call.

    The checkpoint ``folder/step-N`` appears whole or not at all, whoever is killed when, and one
    that is there is never written to; ``folder/latest`` names the last. Its tensors are those of
    `save`, by name, in the format of `torch.distributed.checkpoint`; any number of ranks can load
    them. Reading that format runs pickle: load checkpoints of your own alone. Threads of a process
    without others take turns.

    Args:
        state: The state, the same on all ranks; or of each its part, where owners share it.
        folder: Where the checkpoints of a run are kept; all ranks must see it, and no other run
            write there.
        config: The configuration it is trained with, so that `load_sharded` needs none.
        keep: How many checkpoints stay, the newest, at least 1; None for all.
        process_group: The group; None for all processes, or for one where there are no others.

    Returns:
        The checkpoint; ``folder/step-N.1`` and so on where there was one of that step.

    Raises:
        TypeError: See `save`; or ``folder`` is no path, or ``keep`` no integer.
        ValueError: See `save`; or ``keep`` is below 1.
        RuntimeError: Ranks hold different states, a rank is lost, or one could not write.
        FileNotFoundError: A rank does not see the folder that rank 0 does.
        NotADirectoryError: A file is in the place of the folder.
    """
    return _saving(_as_it_is, state, folder, config, keep, process_group).result()


def async_save_sharded(
    state: TrainState,
    folder: str | os.PathLike[str],
    config: TopKastConfig | None = None,
    *,
    keep: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Future[Path]:
    """Do what `save_sharded` does while training goes on; a collective call.

    It returns when the tensors are copied to the host. A thread of each rank writes them, over a
    group of its own (gloo); the checkpoint gets its name, and ``folder/latest`` names it, when all
    ranks have written. Further saves, `save_sharded` too, wait in line. A process without others
    has written when it returns.

    Args:
        state: See `save_sharded`.
        folder: See `save_sharded`.
        config: See `save_sharded`.
        keep: See `save_sharded`.
        process_group: See `save_sharded`.

    Returns:
        A future. Its ``result()`` waits for what `save_sharded` returns, or raises what that does;
        to be called for the last one before the group is destroyed, and for each whose failure
        is to be known of.

    Raises:
        TypeError: See `save`; or ``folder`` is no path, or ``keep`` no integer.
        ValueError: See `save`; or ``keep`` is below 1.
        RuntimeError: A rank is lost.
    """
    return _saving(_on_the_host, state, folder, config, keep, process_group)


def _saving(
    staged: Callable[[TrainState, Tensors], Tensors],
    state: TrainState,
    folder: str | os.PathLike[str],
    config: TopKastConfig | None,
    keep: int | None,
    process_group: dist.ProcessGroup | None,
) -> Future[Path]:
    from topkast_func.distributed.folder import write  # loads torch's checkpoints: half a second

    check_one(state)
    ranks, step = Ranks(process_group or world()), int(state.step)

    def asked() -> tuple[Path, int | None]:
        return path_of("folder", folder), None if keep is None else check_count("keep", keep, 1)

    def taken() -> tuple[dict[str, Any], Tensors]:
        header, tensors = with_pieces(ranks, state, ranges, *taken_apart(state, config))
        for name, tensor in tensors.items():
            storable(name, tensor)
        return header, staged(state, tensors)

    with calling(ranks, f"in save_sharded at step {step}"):
        place, most = ranks.attempted(asked)
        check_parts(ranks, state)
        ranges = up_to_date(ranks, state)
        header, tensors = ranks.attempted(taken)
        return in_background(ranks, lambda own: write(own, place, step, header, tensors, most))


def _as_it_is(state: TrainState, tensors: Tensors) -> Tensors:
    return tensors


def _on_the_host(state: TrainState, tensors: Tensors) -> Tensors:
    """Copy tensors to the host that are on another device, or may be written to by others."""
    held = {id(leaf) for leaf in tree_leaves(state)}
    return {n: t if t.is_meta else t.to("cpu", copy=id(t) in held) for n, t in tensors.items()}


def load_sharded(
    folder: str | os.PathLike[str],
    config: TopKastConfig | None = None,
    model: Model | None = None,
    optimizer: Optimizer | None = None,
    *,
    device: torch.device | str = "cpu",
    theta_device: torch.device | str | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> TrainState:
    """Read a state that `save_sharded` wrote, on every rank of a group; a collective call.

    The group may have another number of ranks than that which wrote it. With the same number
    training goes on from it bit for bit, after ``torchrun --max-restarts`` too. That needs
    ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` and ``--standalone`` or ``--rdzv-backend=c10d``: else
    torch, up to 2.13 at the least, hands the processes the addresses of those that have ended.

    Args:
        folder: A checkpoint, or a folder of them, of which the last whole one is read.
        config: See `load`.
        model: See `load`.
        optimizer: See `load`.
        device: Where the tensors go; counters stay on the CPU.
        theta_device: Where θ rests in compact storage; None for ``device``.
        process_group: The group; None for all processes, or for one where there are no others.

    Returns:
        The state, the same on all ranks: whole, of which a step of owners takes their parts.

    Raises:
        FileNotFoundError: There is no checkpoint.
        NotADirectoryError: A file is in the place of the folder.
        TypeError: See `load`.
        ValueError: A tensor does not match its checksum, or see `load`.
        RuntimeError: Another rank is lost.
    """
    from topkast_func.distributed.folder import read  # loads torch's checkpoints: half a second

    ranks = Ranks(process_group or world())

    def asked() -> Path:
        check_numbers(f"what reads {folder}")
        if config is not None:
            check_type("config", config, TopKastConfig)
        if optimizer is not None:
            check_optimizer(optimizer)
        return path_of("folder", folder)

    def put() -> TrainState:
        own = agreed(path, header, config)
        with damage_of(path):
            parts = stored(header, without_pieces(header, tensors))
        return put_together(path, parts, own, model, optimizer, device, theta_device)

    with calling(ranks, "in load_sharded"):
        path, header, tensors = read(ranks, ranks.attempted(asked))
        return ranks.attempted(put)
