"""Check and measure on a GPU: ``python -m benchmarks gpu``, at most eight minutes, one JSON file.

What is to be right comes first: the checks of the tests, `tests.on_device`. Then milliseconds in
bfloat16, of the products of a layer and of whole steps. What fails leaves its error; what there is
no time for is missing.
"""

import json
import platform
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from traceback import extract_tb
from typing import Any, TypeAlias

import torch
from torch.utils.benchmark import Timer

import topkast_func as tk
from benchmarks import products, record
from benchmarks.networks import Block, mlp
from tests import on_device

SIDES = (64, 32, 128, 16)
LAYERS = ((4096, 8192), (1024, 2048), (2048, 4096), (8192, 16384), (4096, 2048), (1024, 16384))
"""In and out features, and tokens."""

SPARSITIES = (0.8, 0.9, 0.95)
NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "gpt": (lambda: Block(2048, 16, causal=True), (8, 1024, 2048)),
    "mlp": (lambda: mlp(*[4096] * 5), (8192, 4096)),
}
"""What builds a network, and the shape of what a step takes."""

ENGINES = {"cuda": "triton", "cpu": "reference"}

Entry: TypeAlias = dict[str, Any]
Cases: TypeAlias = Iterator[tuple[str, Callable[[], Any]]]


def measurements(device: str) -> Cases:
    """Yield what is to be measured, by name, what matters most first."""
    each = [
        (f"layer {side} {batch} {block}", partial(layers, device, side, batch, block))
        for (side, batch), block in product(LAYERS, SIDES)
    ]
    yield from each[: len(SIDES)]
    for network, block in product(NETWORKS, (None, 64, 32, 1)):
        yield f"step {network} {block or 'dense'}", partial(step, device, network, block)
    yield from each[len(SIDES) :]


def milliseconds(call: Callable[[], Any]) -> float:
    """Return the median of a call, after two that it may compile and be tuned in."""
    for _ in range(2):
        call()
    timer = Timer("call()", globals={"call": call})
    return 1e3 * float(timer.blocked_autorange(min_run_time=0.04).median)


def layers(device: str, side: int, batch: int, block: int) -> Entry:
    """Time the three products of a layer in bfloat16, and say from which sparsity on they pay."""
    arms = {way: (SPARSITIES[0], way) for way in ("dense", "masked")}
    arms |= {f"blocks {sparsity}": (sparsity, "topkast") for sparsity in SPARSITIES}
    told = {"device": device, "dtype": torch.bfloat16, "engine": ENGINES[device], "b_over_a": 2}
    told |= {"side": side, "batch": batch, "block_shape": (block, block)}
    found = {}
    for name, (sparsity, way) in arms.items():
        made = products.prepare({**told, "sparsities": [sparsity], "way": way})
        found[name] = [milliseconds(call) for call, _ in made.values()]
    sums = {name: sum(times) for name, times in found.items()}
    low, high = (sums[f"blocks {sparsity}"] for sparsity in (SPARSITIES[0], SPARSITIES[-1]))
    slope = (low - high) / (SPARSITIES[-1] - SPARSITIES[0])  # milliseconds are linear in sparsity
    pays = SPARSITIES[0] + (low - sums["dense"]) / slope if slope > 0 else None
    times = {name: sums["dense"] / total for name, total in sums.items()}
    return {"ms": found, "times_as_fast_as_dense": times, "break_even_sparsity": pays}


def step(device: str, network: str, block: int | None) -> Entry:
    """Time a whole step in bfloat16, dense without a block, and the memory it takes."""
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    model = build().to(device, torch.bfloat16)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    method, blocks = tk.topkast() if block else tk.dense(), (block or 1, block or 1)
    config = tk.TopKastConfig(0.9, 0.8, block_shape=blocks, refresh_every=None, method=method)
    optimizer = tk.adamw(1e-4)
    run = tk.make_train_step(model, on_device.energy, config, optimizer)
    state = tk.init_state(model, config, optimizer, theta_device="cpu" if block else None)
    torch.cuda.reset_peak_memory_stats()
    time_ms = milliseconds(lambda: run(state, x))
    return {"ms": time_ms, "peak_mib": torch.cuda.max_memory_allocated() / 2**20}


def main(given: list[str] | None = None) -> None:
    """Do what the command line says, and write after every entry."""
    parser = ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs") / "gpu.json")
    parser.add_argument("--seconds", type=float, default=450.0, help="no more begins after these")
    arguments = parser.parse_args(given)
    if not torch.cuda.is_available():
        parser.exit(1, "there is no GPU that torch can use\n")
    begun, entries, device = time.monotonic(), [], torch.device("cuda")
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    about |= {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    checks = (*on_device.checks(device), *on_device.compiled_checks(device))
    for name, call in (*checks, *measurements("cuda")):
        start, entry = time.monotonic(), Entry(name=name)
        if start - begun > arguments.seconds:
            break
        torch.manual_seed(0)
        try:
            entry |= call() or {"right": True}
        except Exception as reason:  # of a kernel, a compiler or the device: the others go on
            entry["error"] = f"{type(reason).__name__}: {reason}"[:500]
            frames = extract_tb(reason.__traceback__)[-3:]
            entry["where"] = [f"{frame.name}, line {frame.lineno}" for frame in frames]
        torch.compiler.reset()
        torch.cuda.empty_cache()
        entries.append(entry | {"seconds": round(time.monotonic() - start, 1)})
        print(json.dumps(entries[-1]), flush=True)
        record.write(arguments.out, {**about, "entries": entries})


if __name__ == "__main__":
    main()
