"""What a refresh costs: beside one copy of the tensor, and beside a step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import topkast_func as tk
from benchmarks import arms
from benchmarks.networks import problem
from benchmarks.protocol import Arm, Case, Parameters, Task

SIDE, QUICK_SIDE = 4096, 1024
NETWORK, QUICK_NETWORK = "mlp-2048", "mlp-784"
SPARSITIES = {"forward_sparsity": 0.9, "backward_sparsity": 0.8}
BLOCKS = ((1, 1), (4, 4))
CHURN_STEPS, CHURN_LR = 5, 0.5
"""Steps at a high rate before a refresh is timed, so that there are entries to exchange."""


def cases(full: bool) -> list[Case]:
    """Return two cases: selection over one large tensor, and the refresh of a state.

    Args:
        full: At full size.

    Returns:
        The cases.
    """
    side, network = (SIDE, NETWORK) if full else (QUICK_SIDE, QUICK_NETWORK)
    selection = [Arm(way, {"way": way, "side": side}) for way in ("copy", "copy into place")]
    selection.append(Arm("numpy.partition", {"way": "numpy.partition", "side": side}))
    refresh = [Arm("step", {"way": "step", "network": network})]
    for block in BLOCKS:
        name, told = f"{block[0]}×{block[1]}", {"block_shape": block}
        selection.append(Arm(f"masks {name}", {"way": "masks", "side": side, **told}))
        refresh.append(Arm(f"refresh {name}", {"way": "refresh", "network": network, **told}))
    return [
        Case(f"{side * side / 1e6:.1f} M entries", tuple(selection)),
        Case(network, tuple(refresh)),
    ]


def prepare(parameters: Parameters) -> list[Task]:
    """Prepare what an arm is timed at.

    Args:
        parameters: Of the arm.

    Returns:
        One task.
    """
    return [Task("call", WAYS[parameters["way"]](parameters))]


def _copy(parameters: Parameters) -> Callable[[], Any]:
    return _tensor(parameters).clone


def _copy_into_place(parameters: Parameters) -> Callable[[], Any]:
    tensor = _tensor(parameters)
    place = torch.empty_like(tensor)
    return lambda: place.copy_(tensor)


def _partition(parameters: Parameters) -> Callable[[], Any]:
    magnitudes = _tensor(parameters).abs().flatten().numpy()
    return lambda: np.partition(magnitudes, int(0.9 * magnitudes.size))


def _masks(parameters: Parameters) -> Callable[[], Any]:
    params = {"weight": _tensor(parameters)}
    config = tk.TopKastConfig(0.9, 0.8, block_shape=tuple(parameters["block_shape"]))
    return lambda: tk.compute_masks(params, config)


def _tensor(parameters: Parameters) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(parameters["side"], parameters["side"])


def _step(parameters: Parameters) -> Callable[[], Any]:
    return _training(parameters, 1e-3).step


def _refresh(parameters: Parameters) -> Callable[[], Any]:
    training = _training(parameters, CHURN_LR)
    for _ in range(CHURN_STEPS):
        training.step()
    state = training.state()
    return lambda: tk.refresh(state, training.config)


def _training(parameters: Parameters, lr: float) -> arms.Training:
    told = {"optimizer": "sgd", "lr": lr, **SPARSITIES, **parameters}
    return arms.training(problem(parameters["network"]), told)


WAYS: dict[str, Callable[[Parameters], Callable[[], Any]]] = {
    "copy": _copy,
    "copy into place": _copy_into_place,
    "numpy.partition": _partition,
    "masks": _masks,
    "step": _step,
    "refresh": _refresh,
}
