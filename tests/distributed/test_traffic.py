"""What is sent in a step, beside what DistributedDataParallel sends."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import topkast_func as tk
from tests.distributed.processes import results

STEPS = 12
BATCH = (torch.randn(4, 256), torch.randn(4, 64))


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(256, 192), nn.ReLU(), nn.Linear(192, 64))


def _loss(apply: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(apply(batch[0]), batch[1])


class Counted:
    """Count the bytes that are handed to the collectives of tensors."""

    def __init__(self) -> None:
        self.bytes = 0
        vars(dist)["all_reduce"] = self._counting(dist.all_reduce, 0)
        vars(dist)["all_gather"] = self._counting(dist.all_gather, 1)

    def _counting(self, send: Any, place: int) -> Any:
        def counting(*arguments: Any, **options: Any) -> Any:
            self.bytes += arguments[place].nbytes
            return send(*arguments, **options)

        return counting


def _sent(rank: int) -> tuple[int, int, int]:
    """Return the bytes of our steps, of those of DDP, and the number of values."""
    model, counted = _network(), Counted()
    config, optimizer = tk.TopKastConfig(0.9, 0.8, refresh_every=6), tk.adamw(lr=0.01)
    state = tk.init_state(model, config, optimizer)
    group = dist.group.WORLD
    step = tk.make_train_step(model, _loss, config, optimizer, compile=False, process_group=group)
    refreshes = 0
    for _ in range(STEPS):
        state, metrics = step(state, BATCH)
        refreshes += int(metrics.refreshed)
    assert refreshes == 1
    values = sum(value.numel() for value in state.weights.values().values())
    wrapped, of_ddp = DistributedDataParallel(model), 0

    def hook(
        _: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        nonlocal of_ddp
        of_ddp += bucket.buffer().nbytes
        sent = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return sent.then(lambda done: done.value()[0] / 2)

    ours = counted.bytes
    wrapped.register_comm_hook(None, hook)
    for _ in range(STEPS):
        _loss(wrapped, BATCH).backward()  # type: ignore[no-untyped-call]
    return ours, of_ddp, values


def test_a_step_sends_one_number_for_each_value_and_a_fifth_of_a_dense_one() -> None:
    for ours, of_ddp, values in results(_sent):
        assert 4 * values * STEPS < ours <= 1.05 * 4 * values * STEPS
        assert 0 < ours <= 0.22 * of_ddp
