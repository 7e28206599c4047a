"""DistributedDataParallel over sparse modules: two processes, one network."""

from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module

import topkast_func as tk
from tests.distributed.processes import results


def _equal(tensors: dict[str, torch.Tensor]) -> bool:
    """Return whether all processes have the same tensors."""
    flat = torch.cat([t.detach().flatten().double() for t in tensors.values()])
    others = [torch.empty_like(flat) for _ in range(distributed.get_world_size())]
    distributed.all_gather(others, flat)
    return all(torch.equal(flat, other) for other in others)


def _train(rank: int, method: tk.Method) -> None:
    torch.manual_seed(rank)  # other weights and sets, until the process of rank 0 sends its own
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    handle = tk.sparsify(model, tk.TopKastConfig(0.75, 0.5, refresh_every=2, method=method))
    assert not _equal(dict(model.named_parameters()))
    wrapped = nn.parallel.DistributedDataParallel(model)
    alone = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    twin = tk.sparsify(alone, handle.config)
    alone.load_state_dict(model.state_dict())
    runs = [(wrapped, handle), (alone, twin)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1) for m, _ in runs]
    torch.manual_seed(7)
    inputs, refreshes = torch.randn(7, 8, 16), 0
    for batch in inputs:
        halves = (batch[4 * rank : 4 * rank + 4], batch)
        for (network, sparsifier), optimizer, x in zip(runs, optimizers, halves, strict=True):
            optimizer.zero_grad()
            (network(x).square().mean() + sparsifier.penalty()).backward()
            optimizer.step()
            refreshes += sparsifier.step()
        assert _equal(model.state_dict())
        if not method.reads_gradient:
            torch.testing.assert_close(model.state_dict(), alone.state_dict())
    assert refreshes == 6


@pytest.mark.parametrize("method", [tk.topkast(), tk.rigl()], ids=str)
def test_two_processes_train_the_network_of_one(method: tk.Method) -> None:
    results(_train, method)


def _compiled(rank: int) -> list[float]:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    tk.sparsify(model, tk.TopKastConfig(0.75, 0.5), engine="reference")
    run = torch.compile(nn.parallel.DistributedDataParallel(model), backend="aot_eager")
    x = torch.ones(2, 16)
    run(x).sum().backward()
    found = [run(x)[0].tolist(), model[0].weight.grad]
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(found, [model(x)[0].tolist(), model[0].weight.grad])
    return found[0]


def test_a_network_that_is_compiled_before_it_is_broadcast_is_that_of_rank_0() -> None:
    one, other = results(_compiled)
    assert one == other


class _Outer(nn.Module):
    """A module whose part is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(16, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.part(x)
        return out


TOLD = r"'0\.weight' is sparse and has been sharded, .*shard=\"owners\""


def _sharded(rank: int) -> None:
    mesh, other = init_device_mesh("cpu", (1,)), nn.Sequential(nn.Linear(16, 12))
    for reshard in (True, False, None):
        model = _Outer()
        tk.sparsify(model.part, tk.TopKastConfig(0.75, 0.5))
        with pytest.raises(TypeError, match=TOLD):
            fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    seed = nn.Sequential(tk.TopKastLinear(16, 12, 0.75, 0.5))
    with pytest.raises(TypeError, match="'weight' is sparse and has been sharded"):
        fully_shard(seed, mesh=mesh)
    tk.sparsify(other, tk.TopKastConfig(0.75, 0.5))
    other(torch.ones(2, 16)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()


def _distributed(rank: int) -> None:
    model = _Outer()
    tk.sparsify(model.part, tk.TopKastConfig(0.75, 0.5))
    distribute_module(model, init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for use in (lambda: model(torch.ones(2, 16)), optimizer.step, lambda: tk.densify(model)):
        with pytest.raises(TypeError, match=TOLD):
            use()


def _sparse() -> Any:
    model = nn.Sequential(nn.Linear(16, 12))
    tk.sparsify(model, tk.TopKastConfig(0.75, 0.5))
    return model


def _sharded_itself(rank: int) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for part in (_sparse(), _sparse()[0], tk.TopKastLinear(16, 12, 0.75, 0.5)):
        with pytest.raises(TypeError, match=r"sparse and has been sharded, as fully_shard does"):
            fully_shard(part, mesh=mesh)
    part = _sparse()
    with pytest.raises(TypeError, match=r"^fully_shard of a sparse \w+ is not supported: "):
        fully_shard(part, mesh=mesh, ignored_params={*part.parameters()})
    fully_shard(tk.densify(_sparse()), mesh=mesh)


def test_a_sparse_module_is_not_sharded() -> None:
    results(_sharded_itself, ranks=1)


@pytest.mark.parametrize("shard", [_sharded, _distributed])
def test_a_sparse_part_of_a_module_that_is_sharded_is_told_what_does_it_before_it_moves(
    shard: Any,
) -> None:
    results(shard, ranks=1)
