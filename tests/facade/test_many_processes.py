"""DistributedDataParallel over sparse modules: two processes, one network."""

from dataclasses import replace
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


CONFIG = tk.TopKastConfig(0.75, 0.5, refresh_every=2)


def _steps(
    model: nn.Module, sparsifier: tk.Sparsifier, run: Any, inputs: torch.Tensor, count: int = 3
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        run(inputs).square().mean().backward()
        optimizer.step()
        sparsifier.step()


def _apart(
    rank: int, seed: int, own: int, compile: bool, by_hand: bool = False, **options: Any
) -> str:
    """Train ranks of other seeds, of the model or of the sets; return the error."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    method = tk.set() if own else tk.topkast()
    config = replace(CONFIG, method=method, refresh_every=None if by_hand else 2)
    sparsifier = tk.sparsify(model, config, seed=own)
    run: Any = nn.parallel.DistributedDataParallel(model, **options)
    run = torch.compile(run, backend="aot_eager") if compile else run
    try:
        _steps(model, sparsifier, run, torch.ones(2, 16))
        if by_hand:
            sparsifier.refresh()
    except RuntimeError as reason:
        return str(reason)
    return "none"


def _grown(seed: int, group: Any = None) -> dict[str, torch.Tensor]:
    """Train by a method that reads gradients, in a group or alone; return θ and the sets."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    sparsifier = tk.sparsify(model, replace(CONFIG, method=tk.rigl()))
    run = nn.parallel.DistributedDataParallel(model, process_group=group) if group else model
    _steps(model, sparsifier, run, torch.randn(8, 16), count=5)
    return model.state_dict()


def _of_ranks(rank: int) -> dict[str, Any]:
    """Return what comes of ranks that begin apart, and of groups; run in one pair of processes."""
    found = {
        "weights": _apart(rank, rank, 0, False, broadcast_buffers=False),
        "compiled": _apart(rank, rank, 0, True, broadcast_buffers=False),
        "seeds": _apart(rank, 0, 1 + rank, False),
        "by hand": _apart(rank, 0, 1 + rank, False, by_hand=True),
        "alike": _apart(rank, 0, 0, False, broadcast_buffers=False),
        "sent": _apart(rank, rank, 0, False),
    }
    groups = [distributed.new_group([member]) for member in range(2)]
    return {**found, "grown": _grown(rank, groups[rank])}


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    return results(_of_ranks)


APART = {
    "weights": r"before step 0: rank 1 holds another .*'0.weight'\] the first.*leave broadcast_buf",
    "compiled": r"before step 0: rank 1 holds another state than rank 0, .*'0.weight'\] the first",
    "seeds": r"before step 2: rank 1 holds another state than rank 0, .*give tk.sparsify one seed",
    "by hand": r"before step 3: rank 1 holds another state than rank 0, .*give tk.sparsify one",
    "alike": "none",
    "sent": "none",
}


@pytest.mark.parametrize("name", APART)
def test_ranks_whose_sets_differ_all_say_so(name: str, pair: list[dict[str, Any]]) -> None:
    for found in pair:
        with pytest.raises(AssertionError, match=APART[name]):
            raise AssertionError(found[name])


def test_gradients_for_new_sets_are_those_of_the_group_of_the_wrapper(
    pair: list[dict[str, Any]],
) -> None:
    for rank, found in enumerate(pair):
        torch.testing.assert_close(found["grown"], _grown(rank))


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
