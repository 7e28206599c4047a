"""What is sent in a step, beside what DDP and FSDP2 send, and beside what is planned."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
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


class Sent(NamedTuple):
    """Bytes of all steps, the number of values, bytes that FSDP2 holds, and what is planned."""

    ours: int
    ddp: int
    fsdp: int
    values: int
    held_by_fsdp: int
    planned: list[tk.Layout]


def _sent(rank: int) -> Sent:
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
    ours, values = counted.bytes, state.weights.values.values()
    planned = tk.plan(model, config, 2, optimizer).layouts
    of_fsdp, held = _of_fsdp()
    return Sent(ours, _of_ddp(model), of_fsdp, sum(v.numel() for v in values), held, planned)


def _of_ddp(model: nn.Module) -> int:
    wrapped, sent = DistributedDataParallel(model), 0

    def hook(
        _: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        nonlocal sent
        sent += bucket.buffer().nbytes
        done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return done.then(lambda done: done.value()[0] / 2)

    wrapped.register_comm_hook(None, hook)
    for _ in range(STEPS):
        _loss(wrapped, BATCH).backward()  # type: ignore[no-untyped-call]
    return sent


def _of_fsdp() -> tuple[int, int]:
    """Return the bytes that are sent to one other rank, and those that are held."""
    model, mesh, sent = _network(), init_device_mesh("cpu", (2,)), 0

    def counting(send: Any, share: int) -> Any:
        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal sent
            given = options["input"] if "input" in options else arguments[1]
            sent += given.nbytes // share
            return send(*arguments, **options)

        return counting

    for name, share in (("all_gather_single", 1), ("reduce_scatter_single", 2)):
        vars(dist)[name] = counting(getattr(dist, name), share)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        _loss(model, BATCH).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    slots = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *slots]
    return sent, sum(tensor.to_local().nbytes for tensor in held)


@pytest.fixture(scope="module")
def pair() -> list[Sent]:
    return results(_sent)


def test_a_step_sends_one_number_for_each_value_and_a_fifth_of_a_dense_one(
    pair: list[Sent],
) -> None:
    for sent in pair:
        assert 4 * sent.values * STEPS < sent.ours <= 1.05 * 4 * sent.values * STEPS
        assert 0 < sent.ours <= 0.22 * sent.ddp


def test_what_is_planned_is_sent_and_held(pair: list[Sent]) -> None:
    for sent in pair:
        planned = {layout.name: layout for layout in sent.planned}
        ddp, fsdp = planned["dense model, DDP"], planned["dense model, FSDP2"]
        assert STEPS * planned["compact"].sent == pytest.approx(sent.ours, rel=0.01)
        assert STEPS * ddp.sent == sent.ddp
        assert STEPS * fsdp.sent == sent.fsdp
        assert fsdp.device == sent.held_by_fsdp
