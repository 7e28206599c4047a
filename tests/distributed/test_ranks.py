"""Groups and meshes, and what ranks tell each other."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore, HashStore
from torch.distributed.device_mesh import init_device_mesh

import topkast_func as tk
from tests.distributed.processes import results
from topkast_func.distributed.ranks import Ranks

CONFIG, DESCENT = tk.TopKastConfig(0.75, 0.5, refresh_every=2), tk.sgd(0.1, momentum=0.9)


def _network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.25), nn.Linear(8, 2))


def _loss(apply: Callable[..., Tensor], batch: Tensor) -> Tensor:
    return (apply(batch) - 1.0).square().mean()


def _step(model: Any = None, **options: Any) -> Any:
    model = _network() if model is None else model
    return tk.make_train_step(model, _loss, CONFIG, DESCENT, compile=False, **options)


def _start() -> tk.TrainState:
    return tk.init_state(_network(), CONFIG, DESCENT)


def _train(**options: Any) -> tk.TrainState:
    state, step = tk.init_state(_network(), CONFIG, DESCENT), _step(**options)
    for batch in torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(2)):
        state, _ = step(state, batch)
    return state


def _refuse(*arguments: object, **options: object) -> NoReturn:
    raise AssertionError("something is sent")


def _error(work: Callable[[], Any]) -> str:
    try:
        return f"{work()}"
    except Exception as reason:
        return f"{type(reason).__name__}: {reason}"


def _fail_on(rank: int, failing: int) -> str:
    if rank == failing:
        raise OSError("disk full")
    return f"from {rank}"


def _groups(rank: int) -> dict[str, Any]:
    world = dist.group.WORLD
    assert world is not None
    if rank == 1:  # a process may be in groups that the others know nothing of
        dist.new_group([1], use_local_synchronization=True)
    ranks, synced = Ranks(world), nn.Sequential(nn.Linear(6, 8), nn.SyncBatchNorm(8))
    mesh, axes = (
        init_device_mesh("cpu", (2,)),
        init_device_mesh("cpu", (2, 1), mesh_dim_names=("two", "one")),
    )
    alone = [dist.new_group([member]) for member in range(2)]
    errors = {
        "alone": lambda: _step(process_group=alone[rank]),
        "alone in a mesh": lambda: _step(mesh=axes["one"]),
        "both": lambda: _step(process_group=world, mesh=mesh),
        "axes": lambda: _step(mesh=axes),
        "no mesh": lambda: _step(mesh=2),
        "no group": lambda: _step(process_group="world"),
        "outside": lambda: _step(process_group=alone[1 - rank]),
        "saved outside": lambda: tk.save_sharded(_start(), "none", process_group=alone[1 - rank]),
        "loaded outside": lambda: tk.load_sharded("none", process_group=alone[1 - rank]),
        "gathered outside": lambda: tk.gather(_start(), alone[1 - rank]),
        "synced": lambda: _step(synced, process_group=world),
        "samples": lambda: _step(process_group=world, samples=3),
        "lengths": lambda: _rows(world),
        "first": lambda: ranks.by_first(lambda: f"from {rank}"),
        "first fails": lambda: ranks.by_first(lambda: _fail_on(rank, 0)),
        "second fails": lambda: ranks.attempted(lambda: _fail_on(rank, 1)),
    }
    found: dict[str, Any] = {name: _error(work) for name, work in errors.items()}
    found["mesh"], found["group"] = _train(mesh=mesh), _train(process_group=world)
    return found


def _gone(rank: int) -> list[str]:
    first, second = (_step(process_group=dist.group.WORLD) for _ in range(2))
    state, _ = first(_start(), torch.ones(4, 6))
    dist.destroy_process_group()
    found = [_error(lambda: first(state, torch.ones(4, 6)))]
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    return [*found, _error(lambda: second(state, torch.ones(4, 6)))]


def test_a_group_that_is_there_no_more_is_named() -> None:
    for found in results(_gone):
        for told in found:
            assert told.startswith("RuntimeError: the process group is there no more, as after")


def _one(rank: int) -> tk.TrainState:
    for name in ("all_reduce", "all_gather", "all_gather_object"):
        setattr(dist, name, _refuse)
    return _train(process_group=dist.group.WORLD)


def _rows(world: dist.ProcessGroup) -> None:
    step = tk.make_train_step(
        _network(), lambda a, b: _loss(a, b[0]), CONFIG, DESCENT, compile=False, process_group=world
    )
    step(tk.init_state(_network(), CONFIG, DESCENT), (torch.ones(4, 6), torch.ones(3)))


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    return results(_groups)


ALONE = r"ValueError: process_group or mesh has rank [01] of 2 alone, which would train apart"
OUTSIDE = r"ValueError: process_group must be one that this process is in"
EXPECTED = {
    "alone": ALONE,
    "alone in a mesh": ALONE,
    "both": r"ValueError: process_group and mesh are both given",
    "axes": r"ValueError: mesh must have one axis, got 2 of sizes \(2, 1\): give that over which",
    "no mesh": r"TypeError: mesh must be a DeviceMesh, got int",
    "no group": r"TypeError: process_group must be a ProcessGroup, got 'world'",
    "outside": OUTSIDE,
    **{f"{what} outside": OUTSIDE for what in ("saved", "loaded", "gathered")},
    "synced": r"ValueError: the parts \['1'\] of the model are SyncBatchNorm.*: use BatchNorm",
    "samples": r"TypeError: samples must be a function of the batch, got 3",
    "lengths": r"ValueError: the first axes .* have lengths \[3, 4\].*: pass .*samples=f",
    "first": r"from 0",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_wrong_is_named_on_every_rank(name: str, pair: list[dict[str, Any]]) -> None:
    for found in pair:
        with pytest.raises(AssertionError, match=EXPECTED[name]):
            raise AssertionError(found[name])


@pytest.mark.parametrize(("name", "failing"), [("first fails", 0), ("second fails", 1)])
def test_work_that_fails_on_a_rank_fails_on_all(
    name: str, failing: int, pair: list[dict[str, Any]]
) -> None:
    assert pair[failing][name] == "OSError: disk full"
    assert pair[1 - failing][name] == f"OSError: rank {failing} of 2: OSError: disk full"


def test_a_rank_that_never_comes_to_the_store_is_lost(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "store"), 2)
    told = r"waited in vain for the other ranks in make_train_step: a process has ended or hangs"
    with pytest.raises(RuntimeError, match=told), Ranks(None).waiting("in make_train_step"):
        store.wait(["never"], timedelta(seconds=0.1))


def test_a_mesh_of_one_axis_is_its_group(pair: list[dict[str, Any]]) -> None:
    torch.testing.assert_close(pair[0]["mesh"], pair[0]["group"], rtol=0.0, atol=0.0)


def test_a_process_that_was_started_alone_trains_as_without_group_and_sends_nothing() -> None:
    torch.testing.assert_close(results(_one, ranks=1), [_train()])


def test_samples_are_asked_for_with_a_group_alone() -> None:
    with pytest.raises(ValueError, match="samples is for several processes: pass process_group"):
        _step(samples=len)
