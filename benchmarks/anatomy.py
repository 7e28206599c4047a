"""Where the time of a step goes: the three products as they run inside it, and the rest."""

from torch.autograd.profiler import profile

from benchmarks.networks import problem
from benchmarks.protocol import Arm, Case, Parameters
from benchmarks.steps import OURS, USUAL, shown, step_of

NETWORKS, QUICK_NETWORKS = ("mlp-784", "mlp-1024", "mlp-2048"), ("mlp-784",)
BLOCKS = ((1, 1), (4, 4))
PRODUCTS = ("forward", "input_gradient", "weight_gradient")
WARM, COUNTED = 5, 20
"""Steps before the count, and steps that are counted."""


def cases(full: bool) -> list[Case]:
    """Return one case for each network: unstructured sets, and blocks.

    Args:
        full: More networks.

    Returns:
        The cases.
    """
    sparsities = dict(zip(("forward_sparsity", "backward_sparsity"), USUAL, strict=True))
    common: Parameters = {"way": OURS, "optimizer": "sgd", **sparsities}
    return [
        Case(
            network,
            tuple(
                Arm(
                    f"{OURS} {rows}×{columns} {shown(USUAL)}",
                    {**common, "network": network, "block_shape": (rows, columns)},
                )
                for rows, columns in BLOCKS
            ),
        )
        for network in (NETWORKS if full else QUICK_NETWORKS)
    ]


def measure(parameters: Parameters) -> dict[str, float]:
    """Count the time of each kind of product in some steps, under torch's profiler.

    Args:
        parameters: Of the arm.

    Returns:
        Seconds per step: the products of all layers by kind, and the ``rest``.
    """
    step = step_of(problem(parameters["network"]), parameters)
    for _ in range(WARM):
        step()
    with profile() as recorded:
        for _ in range(COUNTED):
            step()
    events = {event.key: event for event in recorded.key_averages()}
    spent = {p: 1e-6 * events[f"topkast_func::{p}"].cpu_time_total / COUNTED for p in PRODUCTS}
    whole = 1e-6 * recorded.self_cpu_time_total / COUNTED
    return {**spent, "rest": whole - sum(spent.values())}
