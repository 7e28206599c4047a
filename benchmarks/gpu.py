"""Check and measure on a GPU: ``python -m benchmarks gpu``, at most eight minutes, one JSON file.

What is to be right comes first: products beside float64, sets beside the CPU's, compiled steps
beside eager ones. Then milliseconds in bfloat16, of the products of a layer and of whole steps.
What fails leaves its error; what there is no time for is missing.
"""

import json
import platform
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import topkast_func as tk
from benchmarks import products, record
from benchmarks.networks import Block, mlp
from benchmarks.protocol import Tasks
from topkast_func.kernels import pattern_of
from topkast_func.kernels.pattern import flattened

SIDES = (64, 32, 128, 16)
LAYERS = ((4096, 8192), (1024, 2048), (2048, 4096), (8192, 16384), (4096, 2048), (1024, 16384))
"""In and out features, and tokens."""

SPARSITIES = (0.8, 0.9, 0.95)
NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "gpt": (lambda: Block(2048, 16, 8192, causal=True), (8, 1024, 2048)),
    "mlp": (lambda: mlp(*[4096] * 5), (8192, 4096)),
}
"""What builds a network, and the shape of what a step takes."""

ENGINES = {"cuda": "triton", "cpu": "reference"}
COMPILE: Any = True

Entry: TypeAlias = dict[str, Any]
Cases: TypeAlias = Iterator[tuple[str, Callable[[], Any]]]


def checks(device: str) -> Cases:
    """Yield what is to be right, by name."""
    tried = [(torch.bfloat16, block, 300) for block in (*SIDES, 48)]
    for case in (*tried, (torch.bfloat16, 32, 1), (torch.float16, 32, 37), (torch.float32, 32, 37)):
        yield "products {} {} {}".format(*case), partial(check_products, device, *case)
    yield "sets", partial(check_sets, device)
    for kind in (("compact", 32), ("compact", 1), ("dense", 1)):
        dtype = torch.float32 if kind == ("compact", 1) else torch.bfloat16
        yield "training {} {}".format(*kind), partial(check_training, device, *kind, dtype)


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


def tasks(
    device: str, side: int, batch: int, block: int, dtype: torch.dtype, sparsity: float, way: str
) -> Tasks:
    """Return the products of a layer, with a B that is twice as large as A."""
    shape = {"side": side, "batch": batch, "block_shape": (block, block)}
    kind = {"device": device, "dtype": dtype, "engine": ENGINES[device], "way": way}
    return products.prepare({**shape, **kind, "sparsities": [sparsity], "b_over_a": 2})


def check_products(device: str, dtype: torch.dtype, block: int, batch: int) -> None:
    """Raise where a product is wrong."""
    for call, check in tasks(device, 6 * block, batch, block, dtype, 0.7, "topkast").values():
        check(call())


def check_sets(device: str) -> None:
    """Raise where sets, with ties, or their patterns are not those of the CPU."""
    theta = torch.randn(512, 384).mul(4).round()
    for method in (tk.topkast(), tk.random_backward(), tk.set()):
        config = tk.TopKastConfig(0.9, 0.8, method=method)
        here, there = (tk.compute_masks({"weight": t}, config) for t in (theta, theta.to(device)))
        found, expected = (flattened(pattern_of(*masks["weight"])) for masks in (there, here))
        if not all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True)):
            raise ArithmeticError(f"other sets by {method}")


def check_training(device: str, storage: Any, block: int, dtype: torch.dtype) -> None:
    """Raise where a compiled step is not the eager one, or where an eager one waits."""
    torch.manual_seed(0)
    model = mlp(128, 256, 64).to(device, dtype)
    config = tk.TopKastConfig(0.7, 0.4, block_shape=(block, block), refresh_every=3)
    optimizer, batch = tk.sgd(10.0), torch.randn(48, 128, device=device, dtype=dtype)
    ends = []
    for compile in (False, COMPILE):
        step = tk.make_train_step(model, energy, config, optimizer, compile=compile)
        state = tk.init_state(model, config, optimizer, storage=storage)
        for number in range(6):
            waits = compile or number not in (1, 2)  # it refreshes before the next, and may wait
            torch.cuda.set_sync_debug_mode("default" if waits else "error")
            state, _ = step(state, batch)
            torch.cuda.set_sync_debug_mode("default")
            if number == 2:  # later, sets that are chosen from rounded numbers may differ
                ends.append(tk.dense_params(state))
    for name, start in model.named_parameters():
        before, a, b = (tensor.float() for tensor in (start, ends[0][name], ends[1][name]))
        rounding = 4 * torch.finfo(dtype).eps * a.abs().max()
        if not (a - before).abs().max() > 2 * rounding or not (a - b).abs().max() <= rounding:
            raise ArithmeticError(f"{name}: compiled and eager steps differ")


def energy(apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the mean square of what a model returns: a loss without targets."""
    return apply(x).float().square().mean()


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
    found = {}
    for name, arm in arms.items():
        made = tasks(device, side, batch, block, torch.bfloat16, *arm)
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
    run = tk.make_train_step(model, energy, config, optimizer)
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
    begun, entries = time.monotonic(), []
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    about |= {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    for name, call in (*checks("cuda"), *measurements("cuda")):
        start, entry = time.monotonic(), Entry(name=name)
        if start - begun > arguments.seconds:
            break
        try:
            entry |= call() or {"right": True}
        except Exception as reason:  # of a kernel, a compiler or the device: the others go on
            entry["error"] = f"{type(reason).__name__}: {reason}"[:500]
        torch.cuda.set_sync_debug_mode("default")
        torch.compiler.reset()
        torch.cuda.empty_cache()
        entries.append(entry | {"seconds": round(time.monotonic() - start, 1)})
        print(json.dumps(entries[-1]), flush=True)
        record.write(arguments.out, {**about, "entries": entries})


if __name__ == "__main__":
    main()
