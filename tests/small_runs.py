"""A small network in float64, and runs of it by any optimiser."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import topkast_func as tk

Batch = tuple[Tensor, Tensor]


def network() -> nn.Module:
    """Weights so small that a few steps change which are the largest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.05)
    return model


def drawn(n: int) -> list[Batch]:
    """Return batches, always the same."""
    generator = torch.Generator().manual_seed(1)

    def draw(columns: int) -> Tensor:
        return torch.randn(8, columns, generator=generator).double()

    return [(draw(6), draw(4)) for _ in range(n)]


def mse(apply: Any, batch: Batch) -> Tensor:
    return (apply(batch[0]) - batch[1]).square().mean()


def run(
    config: tk.TopKastConfig,
    optimizer: tk.Optimizer,
    batches: list[Batch],
    storage: Any = "compact",
    compile: Any = False,
    start: tk.TrainState | None = None,
) -> list[tk.TrainState]:
    """Return the first state, and that after each batch."""
    model = network()
    step = tk.make_train_step(model, mse, config, optimizer, compile=compile)
    states = [start or tk.init_state(model, config, optimizer, storage=storage)]
    for batch in batches:
        states.append(step(states[-1], batch)[0])
    return states


def same(one: Any, other: Any) -> bool:
    """Return whether two trees have the same tensors, bit for bit."""
    leaves = zip(tree_flatten(one)[0], tree_flatten(other)[0], strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in leaves)
