"""Pairs of processes that train together, each pair fresh, forked from one that has torch."""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

FORKING = get_context("forkserver")
FORKING.set_forkserver_preload(["tests.distributed.preloaded"])


class Outcome(NamedTuple):
    """What came of a rank: what its function returned, or its error as text; None if it died."""

    result: Any
    error: str | None


def together(
    function: Callable[..., Any], *arguments: Any, ranks: int = 2, patience: float = 60.0
) -> list[Outcome]:
    """Call ``function(rank, *arguments)`` in processes of one gloo group of their own.

    Args:
        function: A function of a module.
        *arguments: What it takes, picklable.
        ranks: How many processes.
        patience: Time-out of the group, seconds.

    Returns:
        What came of each.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends = [FORKING.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            FORKING.Process(
                target=_run, args=(own, rank, ranks, folder, patience, function, arguments)
            )
            for rank, (_, own) in enumerate(ends)
        ]
        for process, (_, own) in zip(processes, ends, strict=True):
            process.start()
            own.close()
        outcomes = [_received(end) for end, _ in ends]
        for process in processes:
            process.join()
    return outcomes


def results(function: Callable[..., Any], *arguments: Any, ranks: int = 2) -> list[Any]:
    """Return what the function returns on each rank; none may fail."""
    outcomes = together(function, *arguments, ranks=ranks)
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
    return [outcome.result for outcome in outcomes]


def _received(end: Connection) -> Outcome:
    wait([end])
    try:
        outcome: Outcome = pickle.loads(end.recv_bytes())
    except EOFError:
        return Outcome(None, "died")
    return outcome


def _send(end: Connection, outcome: Outcome) -> None:
    """Send tensors by value, not as memory that ends with this process."""
    end.send_bytes(pickle.dumps(outcome))


def _run(
    end: Connection,
    rank: int,
    ranks: int,
    folder: str,
    patience: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=patience),
    )
    try:
        _send(end, Outcome(function(rank, *arguments), None))
    except Exception:
        _send(end, Outcome(None, traceback.format_exc()))
        os._exit(1)  # as a process does that raises; what waits for it must not be waited for
    dist.destroy_process_group()
