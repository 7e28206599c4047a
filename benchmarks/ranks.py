"""Processes of one machine that train together, beside DDP and FSDP2: seconds, and bytes.

A batch is shared among the ranks, so that more of them do the same work. Each computes with one
thread, as though it had a machine of one core. Bytes that are sent are those that go over the
loopback interface in a step, of all ranks together, as Linux counts them; bytes that are held are
exact, of the rank that has most: parameters, sets, slots and gradients.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

import topkast_func as tk
from benchmarks.links import python_behind
from benchmarks.networks import Problem, problem
from benchmarks.parts import timed
from benchmarks.protocol import Parameters, Suite
from benchmarks.steps import BLOCKS, USUAL, Block, arm

Numbers: TypeAlias = dict[str, float]

NETWORK, COUNTS = "mlp-1024", (2, 4)
DDP, FSDP, OURS, OWNERS = "DDP", "FSDP2", "topkast", "topkast owners"
WARM_UP, STEPS, REFRESH = 5, 24, 8
MBIT = 1000  # megabits per second of the loopback interface of a case


class Training(NamedTuple):
    """What a rank trains.

    Attributes:
        step: It makes a step, and returns whether sets were chosen anew.
        held: Tensors of this rank that stay from step to step, and gradients.
        save: ``save(folder)`` to the seconds of checkpoints, where it is of this library.
    """

    step: Callable[[], bool]
    held: Callable[[], Any]
    save: Callable[[str], Numbers] = lambda folder: {}


def _of_rank(of_network: Problem, rank: int, size: int) -> Problem:
    """Return a problem with the rows of a rank."""
    inputs, targets = (rows[rank::size] for rows in (of_network.inputs, of_network.targets))
    return of_network._replace(inputs=inputs, targets=targets)


def _of_torch(own: Problem, module: nn.Module) -> Training:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)

    def step() -> bool:
        optimizer.zero_grad()
        functional.cross_entropy(module(own.inputs), own.targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return False

    def held() -> list[Tensor]:
        slots = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
        found = [*module.parameters(), *(p.grad for p in module.parameters()), *slots]
        return [t.to_local() if hasattr(t, "to_local") else t for t in found]

    return Training(step, held)


def _ddp(own: Problem, p: Parameters) -> Training:
    return _of_torch(own, DistributedDataParallel(own.model) if p["ranks"] > 1 else own.model)


def _fsdp(own: Problem, p: Parameters) -> Training:
    mesh = init_device_mesh("cpu", (p["ranks"],))
    for layer in own.model.modules():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(own.model, mesh=mesh)
    return _of_torch(own, own.model)


def _topkast(own: Problem, p: Parameters, shard: Any = None) -> Training:
    config = tk.TopKastConfig(
        p["forward_sparsity"],
        p["backward_sparsity"],
        refresh_every=REFRESH,
        penalty=None,
        block_shape=p.get("block_shape", (1, 1)),
    )
    optimizer = tk.adamw(lr=1e-3)
    state = tk.init_state(own.model, config, optimizer)
    options: Any = {"compile": p["compile"], "process_group": dist.group.WORLD, "shard": shard}
    train_step = tk.make_train_step(own.model, _loss, config, optimizer, **options)

    def step() -> bool:
        nonlocal state
        state, metrics = train_step(state, (own.inputs, own.targets))
        return bool(metrics.refreshed)

    def save(folder: str) -> Numbers:
        before = time.perf_counter()
        tk.save_sharded(state, f"{folder}/saved", config)
        saved, start = time.perf_counter() - before, time.perf_counter()
        under_way = tk.async_save_sharded(state, f"{folder}/saved", config)
        stalled = time.perf_counter() - start
        under_way.result()
        return {"checkpoint": saved, "stall": stalled}

    return Training(step, lambda: (state[3:], state.weights.values()), save)


def _loss(apply: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(apply(batch[0]), batch[1])


WAYS: dict[str, Callable[[Problem, Parameters], Training]] = {
    DDP: _ddp,
    FSDP: _fsdp,
    OURS: _topkast,
    OWNERS: partial(_topkast, shard="owners"),
}


def _together(measure: Callable[[Training, str], Numbers], p: Parameters) -> Numbers:
    """Return the largest numbers of processes that train together."""
    with tempfile.TemporaryDirectory() as folder:
        fork = get_context("forkserver")
        if "mbit" in p:
            fork.set_executable(python_behind(p["mbit"], Path(folder)))
        with ProcessPoolExecutor(p["ranks"], fork, torch.set_num_threads, (1,)) as own:
            found = list(own.map(partial(_rank, measure, p, folder), range(p["ranks"])))
    return {task: max(numbers[task] for numbers in found) for task in found[0]}


def _rank(
    measure: Callable[[Training, str], Numbers], p: Parameters, folder: str, rank: int
) -> Numbers:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=p["ranks"])
    training = WAYS[p["way"]](_of_rank(problem(p["network"]), rank, p["ranks"]), p)
    for _ in range(WARM_UP):
        training.step()
    found = measure(training, folder)
    dist.destroy_process_group()
    return found


def _seconds(training: Training, folder: str) -> Numbers:
    took: dict[bool, list[float]] = {False: [], True: []}
    parts: dict[str, list[float]] = {}
    for _ in range(STEPS):
        dist.barrier()
        with timed() as spent:
            start = time.perf_counter()
            refreshed = training.step()
            took[refreshed].append(time.perf_counter() - start)
        for part, seconds in spent.items():
            parts.setdefault(part, []).append(seconds)
    found = {"step": statistics.median(took[False])}
    if took[True]:
        found["refresh"] = statistics.median(took[True]) - found["step"]
    found |= {part: statistics.median(seconds) for part, seconds in parts.items()}
    return found | training.save(folder)


def _bytes(training: Training, folder: str) -> Numbers:
    sent = []
    for _ in range(3):
        dist.barrier()
        before = _loopback()
        training.step()
        dist.barrier()
        sent.append(float(_loopback() - before))
    leaves = [t for t in tree_leaves(training.held()) if isinstance(t, Tensor) and not t.is_meta]
    return {"sent in a step": statistics.median(sent), "held": float(sum(t.nbytes for t in leaves))}


def _loopback() -> int:
    """Return the bytes that went over the loopback interface (proc(5))."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    fields = next(line.split(":")[1] for line in lines if line.strip().startswith("lo:"))
    return int(fields.split()[8])


def _arms(ranks: int, compile: bool, **more: Any) -> dict[str, Parameters]:
    blocks: tuple[Block, ...] = ((1, 1), BLOCKS[-1])
    told: dict[str, Any] = {"network": NETWORK, "ranks": ranks, "compile": compile, **more}
    dense, ours = ((DDP,), (OURS,)) if ranks == 1 else ((DDP, FSDP), (OURS, OWNERS))
    own = (arm(way, USUAL, block, **told) for way in ours for block in blocks)
    return dict([*(arm(way, **told) for way in dense), *own])


SECONDS = Suite(
    "ranks_seconds",
    {
        f"{NETWORK}, 1 rank": _arms(1, True),
        f"{NETWORK}, 2 ranks": _arms(2, True),
        f"{NETWORK}, 2 ranks, {MBIT} Mbit/s": _arms(2, True, mbit=MBIT),
    },
    partial(_together, _seconds),
    fresh=True,
)
BYTES = Suite(
    "ranks",
    {f"{NETWORK}, {r} ranks": _arms(r, False) for r in COUNTS},
    partial(_together, _bytes),
    fresh=True,
    unit="bytes",
)
