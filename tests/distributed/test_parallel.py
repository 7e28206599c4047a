"""Data parallel: two ranks compute what one computes with their batches together."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import topkast_func as tk
from tests.distributed.processes import results
from tests.optimizers import EVERY
from tests.storage import STORAGES

CONFIG = tk.TopKastConfig(0.8, 0.5, refresh_every=4, explore_until=15)
METHODS = {
    "topkast": tk.topkast(),
    "value": tk.topkast("value", exchange=None),
    "random_backward": tk.random_backward(),
    "rigl": tk.rigl(),
    "set": tk.set(),
    "static": tk.static(),
    "ste": tk.ste(),
    "gmp": tk.gmp(2, 10),
    "dense": tk.dense(),
}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))


def loss_fn(apply: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Any:
    outputs = apply(batch[0])
    errors = (outputs - batch[1]).square().mean(1)
    return errors.mean(), {"largest": outputs.detach().abs().mean(), "errors": errors.detach()}


def batches(sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    chance = torch.Generator().manual_seed(4)
    return [
        (torch.randn(sum(n), 6, generator=chance), torch.randn(sum(n), 3, generator=chance))
        for n in sizes
    ]


class Trained(NamedTuple):
    theta: dict[str, Tensor]
    masks: dict[str, tk.Masks]
    losses: list[Tensor]
    norms: list[Tensor]
    refreshes: int


def trained(
    config: tk.TopKastConfig,
    optimizer: tk.Optimizer,
    storage: Any,
    sizes: list[tuple[int, int]],
    dtype: torch.dtype,
    part: Callable[[Tensor, tuple[int, int]], Tensor],
    **options: Any,
) -> Trained:
    model = network().to(dtype)
    state = tk.init_state(model, config, optimizer, storage=storage)
    step = tk.make_train_step(model, loss_fn, config, optimizer, **options)
    losses, norms, refreshes = [], [], 0
    for size, batch in zip(sizes, batches(sizes), strict=True):
        own = tuple(part(tensor.to(dtype), size) for tensor in batch)
        state, metrics = step(state, own)
        losses += [metrics.loss, metrics.data_loss, metrics.penalty, metrics.aux["largest"]]
        norms.append(metrics.grad_norm)
        refreshes += int(metrics.refreshed)
    return Trained(tk.dense_params(state), tk.masks_of(state), losses, norms, refreshes)
