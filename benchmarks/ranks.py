"""Processes of one machine that train together, beside DDP and FSDP2: seconds, and bytes.

A batch is shared among the ranks, so that more of them do the same work. Each computes with one
thread, as though it had a machine of one core. Bytes that are sent are those that go over the
loopback interface in a step, of all ranks together, as Linux counts them; bytes that are held are
exact, of the rank that has most: parameters, sets, slots and gradients.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial, wraps
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

import topkast_func as tk
from benchmarks.networks import Problem, loss_fn, problem
from benchmarks.protocol import Numbers, Parameters, Suite
from benchmarks.steps import ENTRIES, OURS, SQUARE, USUAL, arms, training
from topkast_func.distributed import checksums
from topkast_func.distributed.parallel import DataParallel
from topkast_func.storage.compact import CompactWeights
from topkast_func.training import owned, refresh

NETWORK, COUNTS = "mlp-1024", (2, 4)
DDP, FSDP, OWNERS = "DDP", "FSDP2", "topkast owners"
WARM_UP, STEPS, REFRESH = 5, 24, 8
MBIT = 1000  # megabits per second of the loopback interface of a case
SLOWER = """#!/bin/sh
exec unshare --net --map-root-user sh -c '
ip link set lo up &&
tc qdisc add dev lo root tbf rate {mbit}mbit burst 256kb latency 10s &&
exec "$0" "$@"' {python} "$@"
"""
PARTS: tuple[tuple[str, Any, str], ...] = (  # and the function, by where its name is looked up
    ("roll", DataParallel, "_roll"),  # in every step
    ("comparing", checksums, "check_same"),
    ("comparing", checksums.Rest, "checked"),
    ("choosing", refresh, "chosen_anew"),
    ("sending", owned, "_sets"),
    ("storing", CompactWeights, "reindexed"),
)


class Rank(NamedTuple):
    """What a rank trains."""

    step: Callable[[], Any]
    held: Callable[[], Any]  # tensors of this rank that stay from step to step, and gradients
    save: Callable[[str], Numbers] = lambda folder: {}  # to seconds of checkpoints, if it has any


def _of_torch(own: Problem, module: nn.Module) -> Rank:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(module, own.batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def held() -> list[Tensor]:
        slots = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
        found = [*module.parameters(), *(p.grad for p in module.parameters()), *slots]
        return [t.to_local() if hasattr(t, "to_local") else t for t in found]

    return Rank(step, held)


def _ddp(own: Problem, p: Parameters) -> Rank:
    return _of_torch(own, DistributedDataParallel(own.model) if p["ranks"] > 1 else own.model)


def _fsdp(own: Problem, p: Parameters) -> Rank:
    mesh = init_device_mesh("cpu", (p["ranks"],))
    for layer in own.model.modules():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(own.model, mesh=mesh)
    return _of_torch(own, own.model)


def _topkast(own: Problem, p: Parameters, shard: str | None = None) -> Rank:
    told = {**p, "optimizer": "adamw", "refresh_every": REFRESH}
    options: Any = {"compile": p["compile"], "process_group": dist.group.WORLD, "shard": shard}
    step, state, config = training(own, told, **options)

    def save(folder: str) -> Numbers:
        start = time.perf_counter()
        tk.save_sharded(state(), f"{folder}/saved", config)
        saved = time.perf_counter()
        under_way = tk.async_save_sharded(state(), f"{folder}/saved", config)
        stalled = time.perf_counter()
        under_way.result()
        return {"checkpoint": saved - start, "stall": stalled - saved}

    return Rank(step, lambda: (state()[3:], state().weights.values), save)


WAYS: dict[str, Callable[[Problem, Parameters], Rank]] = {
    DDP: _ddp,
    FSDP: _fsdp,
    OURS: _topkast,
    OWNERS: partial(_topkast, shard="owners"),
}


def python_behind(mbit: int, folder: str) -> str:
    """Write this Python, with a loopback interface of so many megabits per second of its own.

    It is that of a network namespace, for which no privilege is needed where user namespaces are
    allowed. What any process sends to another goes through one queue, so that the speed is that
    of both directions, and of all ranks, together.
    """
    program = Path(folder) / "python"
    program.write_text(SLOWER.format(mbit=mbit, python=sys.executable))
    program.chmod(0o700)
    return str(program)


def _together(measure: Callable[[Rank, str], Numbers], p: Parameters) -> Numbers:
    """Return the largest numbers of processes that train together."""
    with tempfile.TemporaryDirectory() as folder:
        fork = get_context("forkserver")
        if "mbit" in p:
            fork.set_executable(python_behind(p["mbit"], folder))
        with ProcessPoolExecutor(p["ranks"], fork, torch.set_num_threads, (1,)) as own:
            found = list(own.map(partial(_rank, measure, p, folder), range(p["ranks"])))
    return {task: max(numbers[task] for numbers in found) for task in found[0]}


def _rank(
    measure: Callable[[Rank, str], Numbers], p: Parameters, folder: str, rank: int
) -> Numbers:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=p["ranks"])
    model, (inputs, targets) = problem(p["network"])
    batch = inputs[rank :: p["ranks"]], targets[rank :: p["ranks"]]
    own = WAYS[p["way"]](Problem(model, batch), p)
    for _ in range(WARM_UP):
        own.step()
    found = measure(own, folder)
    dist.destroy_process_group()
    return found


def _seconds(own: Rank, folder: str) -> Numbers:
    spent: dict[str, float] = {}
    for part, owner, name in PARTS:  # of a process that does nothing else
        setattr(owner, name, _timing(spent, part, getattr(owner, name)))
    took: dict[str, list[float]] = {"step": [], "refresh": []}
    for _ in range(STEPS):
        dist.barrier()
        spent.clear()
        start = time.perf_counter()
        own.step()
        spent["refresh" if "choosing" in spent else "step"] = time.perf_counter() - start
        for part, seconds in spent.items():
            took.setdefault(part, []).append(seconds)
    found = {part: statistics.median(seconds) for part, seconds in took.items() if seconds}
    if "refresh" in found:
        found["refresh"] -= found["step"]
    return {**found, **own.save(folder)}


def _timing(spent: dict[str, float], part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function add what it takes to the seconds that are spent in a part."""

    @wraps(function)
    def call(*arguments: Any, **more: Any) -> Any:
        start = time.perf_counter()
        found = function(*arguments, **more)
        spent[part] = spent.get(part, 0.0) + time.perf_counter() - start
        return found

    return call


def _bytes(own: Rank, folder: str) -> Numbers:
    from psutil import net_io_counters

    sent = []
    for _ in range(3):
        dist.barrier()
        before = net_io_counters(pernic=True)["lo"].bytes_sent
        own.step()
        dist.barrier()
        sent.append(float(net_io_counters(pernic=True)["lo"].bytes_sent - before))
    leaves = [t for t in tree_leaves(own.held()) if isinstance(t, Tensor) and not t.is_meta]
    return {"sent in a step": statistics.median(sent), "held": float(sum(t.nbytes for t in leaves))}


def _arms(ranks: int, compile: bool = True, **more: Any) -> dict[str, Parameters]:
    told: dict[str, Any] = {"network": NETWORK, "ranks": ranks, "compile": compile, **more}
    dense, ours = ((DDP,), (OURS,)) if ranks == 1 else ((DDP, FSDP), (OURS, OWNERS))
    return arms(dense, **told) | arms(ours, [USUAL], [ENTRIES, SQUARE], **told)


_PAIR = f"{NETWORK}, 2 ranks"
_TIMED = {f"{NETWORK}, 1 rank": _arms(1), _PAIR: _arms(2)}
_TIMED[f"{_PAIR}, {MBIT} Mbit/s"] = _arms(2, mbit=MBIT)
SECONDS = Suite("ranks_seconds", _TIMED, partial(_together, _seconds), fresh=True)
_COUNTED = {f"{NETWORK}, {ranks} ranks": _arms(ranks, compile=False) for ranks in COUNTS}
BYTES = Suite("ranks", _COUNTED, partial(_together, _bytes), fresh=True, unit="bytes")
