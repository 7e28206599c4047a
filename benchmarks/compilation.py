"""Seconds until the first step is done, with empty caches on disk and with full ones."""

import json
import os
import subprocess
import sys
import tempfile
import time

from benchmarks.networks import problem
from benchmarks.protocol import Arm, Case, Parameters
from benchmarks.steps import step_of

NETWORKS, QUICK_NETWORKS = ("mlp-784", "mlp-1024"), ("mlp-784",)
WAYS: dict[str, Parameters] = {
    "dense": {"way": "dense"},
    "dense compiled": {"way": "dense compiled"},
    "dense compiled, optimiser too": {"way": "dense compiled, optimiser too"},
    "topkast 1×1 90/80": {"way": "topkast", "forward_sparsity": 0.9, "backward_sparsity": 0.8},
    "topkast 4×4 90/80": {
        "way": "topkast",
        "forward_sparsity": 0.9,
        "backward_sparsity": 0.8,
        "block_shape": (4, 4),
    },
}


def cases(full: bool) -> list[Case]:
    """Return one case for each network.

    Args:
        full: More networks.

    Returns:
        The cases.
    """
    networks = NETWORKS if full else QUICK_NETWORKS
    return [
        Case(
            network,
            tuple(
                Arm(name, {"network": network, "optimizer": "sgd", **way})
                for name, way in WAYS.items()
            ),
        )
        for network in networks
    ]


def measure(parameters: Parameters) -> dict[str, float]:
    """Start an arm twice, each time in a process of its own, with caches that no other uses.

    Args:
        parameters: Of the arm.

    Returns:
        Seconds ``cold`` and ``warm``.
    """
    with tempfile.TemporaryDirectory() as caches:
        return {name: _first_step(parameters, caches) for name in ("cold", "warm")}


def _first_step(parameters: Parameters, caches: str) -> float:
    own = {"NUMBA_CACHE_DIR": f"{caches}/numba", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
    ours = {key: value for key, value in os.environ.items() if key != COMPILE_THREADS}
    command = [sys.executable, "-m", __name__, json.dumps(dict(parameters))]
    result = subprocess.run(
        command, env={**ours, **own}, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(result.stdout.splitlines()[-1])


def main() -> None:
    """Print the seconds from the network to the loss of its first step, imports apart."""
    parameters = json.loads(sys.argv[1])
    of_network = problem(parameters["network"])
    start = time.perf_counter()
    float(step_of(of_network, parameters)())
    print(time.perf_counter() - start)


COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
"""Left to its default here, where compiling is what is measured."""

if __name__ == "__main__":
    main()
