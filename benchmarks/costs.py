"""What training costs beside its steps: refreshes, memory, and the time until the first step."""

import ctypes
import gc
import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import topkast_func as tk
from benchmarks import steps
from benchmarks.networks import problem
from benchmarks.products import sets
from benchmarks.protocol import Parameters, Suite, Tasks, fresh

SIDE, KTH = 4096, int(0.9 * 4096**2)
LARGE, REHEARSAL, STEPS = "mlp-2048", "mlp-64", 3
CHURN_STEPS, CHURN_LR = 5, 0.5  # before a refresh is timed, so that there are entries to exchange


def _training(block: steps.Block, lr: float) -> steps.Training:
    arm, *_ = steps.arms([steps.OURS], [steps.USUAL], [block], lr=lr).values()
    return steps.training(problem(LARGE), arm)


def _refresh(block: steps.Block) -> Callable[[], Any]:
    step, state, config = _training(block, CHURN_LR)
    for _ in range(CHURN_STEPS):
        step()
    return partial(tk.refresh, state(), config)


STARTS: dict[str, dict[str, Callable[[], Callable[[], Any]]]] = {  # by case and way
    f"{SIDE**2 / 1e6:.1f} M entries": {
        "copy": lambda: torch.randn(SIDE, SIDE).clone,
        "copy into place": lambda: partial(torch.empty(SIDE, SIDE).copy_, torch.randn(SIDE, SIDE)),
        "numpy.partition": lambda: partial(
            np.partition, torch.randn(SIDE, SIDE).abs().ravel().numpy(), KTH
        ),
        "masks 1×1": lambda: partial(sets, torch.randn(SIDE, SIDE), *steps.USUAL),
        "masks 4×4": lambda: partial(sets, torch.randn(SIDE, SIDE), *steps.USUAL, steps.SQUARE),
    },
    LARGE: {
        "step": lambda: _training(steps.ENTRIES, 1e-3).step,
        "refresh 1×1": lambda: _refresh(steps.ENTRIES),
        "refresh 4×4": lambda: _refresh(steps.SQUARE),
    },
}


def _refresh_tasks(p: Parameters) -> Tasks:
    return {"call": (STARTS[p["case"]][p["way"]](), lambda output: None)}


def _memory(p: Parameters) -> dict[str, float]:
    """Measure the memory of an arm in this process, which has done nothing else, in bytes.

    A rehearsal on a small network comes first, so that the code, and what compilers and thread
    pools keep, is there before the count begins. Both peaks are above the process after it.
    """
    _steps(REHEARSAL, p)
    torch.compiler.reset()  # or it would compile the large network for any shape
    before = _start_counting()
    step = _steps(p["network"], p)
    from_start = _bytes("VmHWM") - before
    _start_counting()
    for _ in range(STEPS):
        step()
    of_steps = _bytes("VmHWM") - before
    return {"peak, start included": from_start, "peak of steps": of_steps, **exact(p)}


def _steps(network: str, p: Parameters) -> Callable[[], Tensor]:
    step = steps.WAYS[p["way"]](problem(network), p)
    for _ in range(STEPS):
        step()
    return step


def exact(p: Parameters) -> dict[str, float]:
    """Count values, indices, slots and a gradient of the values' size; and the dense θ apart."""
    network = problem(p["network"])
    dense = float(sum(weight.nbytes for weight in network.model.parameters()))
    if p["way"] != "topkast":  # a weight, its gradient and two slots of Adam
        return {"dense weights": dense, "trained state": 4 * dense}
    rows = tk.summary(steps.training(network, p).state()).rows
    trained = float(sum(row.bytes + 4 * row.backward for row in rows))
    theta = float(sum(4 * math.prod(row.shape) for row in rows if row.backward_density < 1))
    return {"dense weights": dense, "trained state": trained, "theta": theta}


def _start_counting() -> float:
    """Give freed memory back, let the peak count from here (proc(5)), and return what is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _bytes("VmRSS")


def _bytes(field: str) -> float:
    """Return a field of this process; the kernel gives kibibytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(dict(line.split(":", 1) for line in lines)[field].split()[0])


def _compilation(p: Parameters) -> dict[str, float]:
    """Start an arm twice, in processes of their own, with caches that no other uses."""
    os.environ.pop("TORCHINDUCTOR_COMPILE_THREADS", None)  # compiling is what is measured
    with tempfile.TemporaryDirectory() as caches:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
        return {name: fresh(_first_step, p, torch.get_num_threads()) for name in ("cold", "warm")}


def _first_step(p: Parameters) -> float:
    """Return the seconds from the network to the loss of its first step, imports apart."""
    of_network = problem(p["network"])
    start = time.perf_counter()
    float(steps.WAYS[p["way"]](of_network, p)())
    return time.perf_counter() - start


def _arms(**told: Any) -> dict[str, Parameters]:
    return steps.arms(steps.DENSE, **told) | steps.arms(
        [steps.OURS], [steps.USUAL], [steps.ENTRIES, steps.SQUARE], **told
    )


_CASES = {case: {way: {"case": case, "way": way} for way in ways} for case, ways in STARTS.items()}
REFRESH = Suite("refresh", _CASES, _refresh_tasks)
_LARGE = {LARGE: _arms(network=LARGE, optimizer="adam")}
MEMORY = Suite("memory", _LARGE, _memory, fresh=True, unit="bytes")
_SMALL = {network: _arms(network=network) for network in ("mlp-784", "mlp-1024")}
COMPILATION = Suite("compilation", _SMALL, _compilation, fresh=True)
