"""Memory of a training: the peak of a fresh process, and the exact bytes of what is trained."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import arms
from benchmarks.networks import Problem, problem
from benchmarks.protocol import Arm, Case, Parameters
from benchmarks.steps import step_of

NETWORK, QUICK_NETWORK = "mlp-2048", "mlp-784"
REHEARSAL = "mlp-64"
STEPS = 3
SPARSITIES = {"forward_sparsity": 0.9, "backward_sparsity": 0.8}


def cases(full: bool) -> list[Case]:
    """Return one case: dense Adam, and this library's.

    Args:
        full: On the large network.

    Returns:
        The case.
    """
    network = NETWORK if full else QUICK_NETWORK
    common = {"network": network, "optimizer": "adam"}
    ours = {**common, "way": "topkast", **SPARSITIES}
    return [
        Case(
            network,
            (
                Arm("dense", {**common, "way": "dense"}),
                Arm("dense compiled", {**common, "way": "dense compiled"}),
                Arm("topkast 1×1 90/80", ours),
                Arm("topkast 4×4 90/80", {**ours, "block_shape": (4, 4)}),
            ),
        )
    ]


def measure(parameters: Parameters) -> dict[str, float]:
    """Measure the memory of an arm in this process, which has done nothing else.

    A rehearsal on a small network comes first, so that the code, and what compilers and thread
    pools keep, is there before the count begins.

    Args:
        parameters: Of the arm.

    Returns:
        Bytes: ``peak, start included`` and ``peak of steps``, both above the process after the
        rehearsal; ``trained state`` and ``theta`` exactly; ``dense weights`` for one copy of
        the weights, by which to divide.
    """
    _run(problem(REHEARSAL), parameters)
    torch.compiler.reset()  # or it would compile the large network for any shape
    _tidy()
    before = _status("VmRSS")
    _reset_peak()
    of_network = problem(parameters["network"])
    weights = sum(p.nbytes for p in of_network.model.parameters())
    step = _run(of_network, parameters)
    from_start = _status("VmHWM") - before
    _tidy()
    _reset_peak()
    for _ in range(STEPS):
        step()
    return {
        "peak, start included": from_start,
        "peak of steps": _status("VmHWM") - before,
        "dense weights": float(weights),
        **_exact(of_network, parameters),
    }


def _run(of_network: Problem, parameters: Parameters) -> Callable[[], Tensor]:
    step = step_of(of_network, parameters)
    for _ in range(STEPS):
        step()
    return step


def _exact(of_network: Problem, parameters: Parameters) -> dict[str, float]:
    if parameters["way"] == "topkast":
        return arms.trained_bytes(arms.training(of_network, parameters).state())
    weight_gradient_and_adam = 4 * sum(p.nbytes for p in of_network.model.parameters())
    return {"trained state": float(weight_gradient_and_adam)}


def _tidy() -> None:
    """Give freed memory back, so that what is resident is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> float:
    """Return a field of this process in bytes; the kernel gives kibibytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024.0 * int(line.split()[1])
    raise OSError(f"the kernel does not tell {field}")


def _reset_peak() -> None:
    """Let VmHWM count from what is resident now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
