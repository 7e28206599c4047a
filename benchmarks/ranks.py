"""Data parallel over processes of one machine: seconds and bytes of a step, beside DDP.

A batch is shared among the ranks, so that more of them do the same work. Bytes are those that go
over the loopback interface in a step, of all ranks together, as Linux counts them.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import topkast_func as tk
from benchmarks.networks import Problem, problem
from benchmarks.protocol import Parameters, Suite
from benchmarks.steps import BLOCKS, USUAL, Block, arm

Step: TypeAlias = Callable[[], Any]

NETWORKS, RANKS = ("mlp-784", "mlp-2048"), (1, 2)
DDP, OURS = "DDP", "topkast"
WARM_UP, STEPS = 5, 20


def _of_rank(of_network: Problem, rank: int, size: int) -> Problem:
    """Return a problem with the rows of a rank."""
    inputs, targets = (rows[rank::size] for rows in (of_network.inputs, of_network.targets))
    return of_network._replace(inputs=inputs, targets=targets)


def _ddp(own: Problem, p: Parameters) -> Step:
    module = DistributedDataParallel(own.model) if p["ranks"] > 1 else own.model
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss = functional.cross_entropy(module(own.inputs), own.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _topkast(own: Problem, p: Parameters) -> Step:
    config = tk.TopKastConfig(
        p["forward_sparsity"],
        p["backward_sparsity"],
        refresh_every=None,
        penalty=None,
        block_shape=p.get("block_shape", (1, 1)),
        sparse=p.get("sparse"),
    )
    optimizer = tk.adamw(lr=1e-3)
    state = tk.init_state(own.model, config, optimizer)
    train_step = tk.make_train_step(
        own.model,
        _loss,
        config,
        optimizer,
        compile=p.get("compile", True),
        process_group=dist.group.WORLD,
    )

    def step() -> None:
        nonlocal state
        state, _ = train_step(state, (own.inputs, own.targets))

    return step


def _loss(apply: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(apply(batch[0]), batch[1])


WAYS: dict[str, Callable[[Problem, Parameters], Step]] = {DDP: _ddp, OURS: _topkast}


def _together(p: Parameters) -> list[tuple[float, float]]:
    """Return, by rank, the median seconds and bytes of a step of processes that train together."""
    with tempfile.TemporaryDirectory() as folder:
        threads = (torch.get_num_threads(),)
        fork = get_context("forkserver")
        with ProcessPoolExecutor(p["ranks"], fork, torch.set_num_threads, threads) as own:
            return list(own.map(partial(_rank, p, folder), range(p["ranks"])))


def _rank(p: Parameters, folder: str, rank: int) -> tuple[float, float]:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=p["ranks"])
    step = WAYS[p["way"]](_of_rank(problem(p["network"]), rank, p["ranks"]), p)
    for _ in range(WARM_UP):
        step()
    seconds, sent = [], []
    for _ in range(STEPS):
        dist.barrier()
        before, start = _loopback(), time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        dist.barrier()
        sent.append(float(_loopback() - before))
    dist.destroy_process_group()
    return statistics.median(seconds), statistics.median(sent)


def _loopback() -> int:
    """Return the bytes that went over the loopback interface (proc(5))."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    fields = next(line.split(":")[1] for line in lines if line.strip().startswith("lo:"))
    return int(fields.split()[8])


def _seconds(p: Parameters) -> dict[str, float]:
    return {"step": max(seconds for seconds, _ in _together(p))}


def _bytes(p: Parameters) -> dict[str, float]:
    return {"step": max(sent for _, sent in _together(p))}


def _arms(network: str, ranks: int) -> dict[str, Parameters]:
    blocks: tuple[Block, ...] = ((1, 1), BLOCKS[-1])
    told: dict[str, Any] = {"network": network, "ranks": ranks}
    return dict([arm(DDP, **told), *(arm(OURS, USUAL, block, **told) for block in blocks)])


_CASES = {f"{n}, {r} ranks": _arms(n, r) for n in NETWORKS for r in RANKS}
_SEVERAL = {case: arms for case, arms in _CASES.items() if not case.endswith("1 ranks")}
SECONDS = Suite("ranks", _CASES, _seconds, fresh=True)
TRAFFIC = Suite("traffic", _SEVERAL, _bytes, fresh=True, unit="bytes")
