"""Data parallel: two ranks compute what one computes with their batches together."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

import topkast_func as tk
from tests.distributed.processes import results
from tests.optimizers import EVERY
from tests.storage import dense_slots
from topkast_func.compiling import untold
from topkast_func.distributed.batches import FILLER

ADAM = tk.adamw(lr=0.01)

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
OPTIMIZERS = ("momentum", "lion", "clipped", "gathered", "all")
UNEVEN, TWO_SHAPES = ((4, 4), (1, 7), (8, 3), (0, 5), (6, 0)), ((4, 4),) * 4 + ((4, 0),)
STEPS = 20

Sizes: TypeAlias = tuple[tuple[int, int], ...]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))


def loss_fn(apply: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Any:
    outputs = apply(batch[0])
    errors = (outputs - batch[1]).square().mean(1)
    largest = outputs.amax(0)  # which an empty batch has not
    found = {"size": outputs.abs().mean(), "errors": errors, "largest": largest}
    return errors.mean(), {name: tensor.detach() for name, tensor in found.items()}


def batches(count: int, cycle: Sizes = UNEVEN) -> list[tuple[Tensor, Tensor, tuple[int, int]]]:
    """Return inputs and targets of both ranks together, and how many are of each."""
    chance = torch.Generator().manual_seed(4)
    sizes = [cycle[i % len(cycle)] for i in range(count)]
    tensors = [torch.randn(sum(size), 9, generator=chance).double() for size in sizes]
    return [(t[:, :6], t[:, 6:], size) for t, size in zip(tensors, sizes, strict=True)]


class Trained(NamedTuple):
    """What a training came to."""

    theta: dict[str, Tensor]
    masks: dict[str, tk.Masks]
    slots: dict[str, dict[str, Tensor]]
    numbers: list[Tensor]
    refreshes: int


def trained(
    rank: int | None,
    config: tk.TopKastConfig = CONFIG,
    optimizer: tk.Optimizer = ADAM,
    storage: Any = "compact",
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    compile: Any = False,
    cycle: Sizes = UNEVEN,
    shard: Any = None,
    model: Callable[[], nn.Sequential] = network,
    loss: Any = loss_fn,
) -> Trained:
    """Train on the part of a rank, or alone on all."""
    module = model().to(dtype)
    state = tk.init_state(module, config, optimizer, storage=storage, mask_seed=1)
    together = {} if rank is None else {"process_group": dist.group.WORLD, "shard": shard}
    step = tk.make_train_step(module, loss, config, optimizer, compile=compile, **together)
    numbers, refreshes = [], 0
    for *batch, (first, _) in batches(steps, cycle):
        ends = {None: slice(None), 0: slice(first), 1: slice(first, None)}
        part = ends.get(rank, slice(0))  # what is beyond two ranks has no samples
        state, metrics = step(state, tuple(tensor[part].to(dtype) for tensor in batch))
        assert metrics.aux["errors"].shape[0] in (len(batch[0][part]), FILLER)
        numbers += [*metrics[:4], metrics.aux["size"]]
        refreshes += int(metrics.refreshed)
    state = tk.gather(state) if together else state
    return Trained(
        tk.dense_params(state), tk.masks_of(state), dense_slots(state), numbers, refreshes
    )


CASES: dict[str, dict[str, Any]] = {
    **{name: {"config": replace(CONFIG, method=method)} for name, method in METHODS.items()},
    **{name: {"optimizer": EVERY[name], "steps": 9} for name in OPTIMIZERS},
    "dense storage": {"storage": "dense"},
    "rigl, dense storage": {"storage": "dense", "config": replace(CONFIG, method=tk.rigl())},
    "staged": {"config": replace(CONFIG, forward_sparsity=tk.staged({0: 0.5, 7: 0.8}))},
    "powerprop": {"config": replace(CONFIG, powerprop=2.0)},
    "blocks": {"config": replace(CONFIG, block_shape=(2, 2), sparse=["0.weight", "2.weight"])},
}
COMPILED = {"backend": "aot_eager"}


OWNED = ("topkast", "random_backward", "rigl", "gmp", *OPTIMIZERS, "staged", "powerprop", "blocks")
SHARED = {None: [*CASES], "owners": [*OWNED]}
"""Names of cases, by how the ranks share a state."""


@cache
def alone(name: str) -> Trained:
    """Train a case in one process."""
    return trained(None, **CASES[name])


def _every_case(rank: int) -> dict[tuple[str, Any], Trained]:
    cases = [(name, shard) for shard, names in SHARED.items() for name in names]
    return {(name, shard): trained(rank, **CASES[name], shard=shard) for name, shard in cases}


@pytest.fixture(scope="module")
def pair() -> list[dict[tuple[str, Any], Trained]]:
    return results(_every_case)


@pytest.mark.parametrize(("shard", "name"), [(s, n) for s, names in SHARED.items() for n in names])
def test_two_ranks_train_as_one_does_with_their_batches_together(
    name: str, shard: Any, pair: list[dict[tuple[str, Any], Trained]]
) -> None:
    one, (first, second) = alone(name), (rank[name, shard] for rank in pair)
    assert_close(first, one)
    assert one.refreshes > 0 or name == "dense"
    start = dict(network().double().named_parameters())
    assert all((theta - start[n]).abs().max() > 1e-3 for n, theta in one.theta.items())
    assert_close(second, first, rtol=0.0, atol=0.0)


def _interrupted(rank: int) -> list[Trained]:
    """Let one rank do on the way what may make a turn begin again: draw, compile a kernel."""
    steps = 0

    def of_one(apply: Callable[..., Tensor], batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if rank == 1 and steps > 9:
            with untold():
                torch.rand(1)
        return loss_fn(apply, batch)

    return [trained(rank, shard=shard, loss=of_one) for shard in SHARED]


def test_what_one_rank_does_alone_leaves_them_in_step() -> None:
    for pair in zip(*results(_interrupted), strict=True):
        for found in pair:
            assert_close(found, alone("topkast"))


BARE = replace(CONFIG, penalty=None)


def _bits(rank: int) -> list[Trained]:
    return [trained(rank, BARE, dtype=torch.float32, shard=shard) for shard in SHARED]


def test_ranks_and_owners_are_the_same_bit_for_bit_in_float32() -> None:
    (first, owned), *others = results(_bits)
    for other in (owned, *others[0]):
        assert_close(other, first, rtol=0.0, atol=0.0)


def _compiled(rank: int) -> tuple[Trained, int, int, list[dict[str, Tensor]]]:
    counters.clear()
    ran = trained(rank, compile=COMPILED, steps=10, cycle=TWO_SHAPES)
    breaks, graphs = len(counters["graph_break"]), counters["stats"]["unique_graphs"]
    return ran, breaks, graphs, _changing(rank, COMPILED, 3)


@pytest.fixture(scope="module")
def compiled() -> list[tuple[Trained, int, int, list[dict[str, Tensor]]]]:
    return results(_compiled)


def test_compiled_ranks_train_as_an_eager_process_in_a_graph_for_each_shape(compiled: Any) -> None:
    """Owners are compiled beside split tensors, in another module."""
    one = trained(None, steps=10, cycle=TWO_SHAPES)
    (first, *of_first, _), (second, *of_second, _) = compiled
    start, sets = network().get_parameter("0.weight").double(), one.masks["0.weight"]
    assert (one.theta["0.weight"] - start)[sets.backward & ~sets.forward].abs().max() > 0
    assert (of_first, of_second) == ([0, 1], [0, 2])
    assert_close(first, one)
    assert_close(second, first, rtol=0.0, atol=0.0)


NORMED = tk.TopKastConfig(0.8, 0.5, refresh_every=4)


def _normed() -> nn.Sequential:
    torch.manual_seed(2)
    parts = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    return nn.Sequential(*parts).double()


def _of_both(apply: Callable[..., Tensor], batch: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the loss of both parts, each normalised alone."""
    rows = sum(len(inputs) for inputs, _ in batch)
    losses = [len(part[0]) / rows * loss_fn(apply, part)[0] for part in batch if len(part[0])]
    return torch.stack(losses).sum()


def _parts(step: int) -> list[tuple[Tensor, Tensor]]:
    first = (3, 5, 2, 8, 0)[step % 5]
    chance = torch.Generator().manual_seed(step)
    both = torch.randn(8, 9, generator=chance).double()
    return [(part[:, :6], part[:, 6:]) for part in (both[:first], both[first:])]


def _train_normed(rank: int | None) -> list[tk.TrainState]:
    model = _normed()
    states = [tk.init_state(model, NORMED, ADAM)]
    whole = rank is None
    step = tk.make_train_step(
        model,
        _of_both if whole else loss_fn,
        NORMED,
        ADAM,
        compile=False,
        process_group=None if whole else dist.group.WORLD,
    )
    for number in range(STEPS):
        batch: Any = _parts(number)
        state, _ = step(states[-1], batch if rank is None else batch[rank])
        states.append(state)
    return states


def _dropping(rank: int | None) -> list[Tensor]:
    """Return the errors of eight equal rows, by step, and θ at the end."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    config = tk.TopKastConfig(0.5, 0.2, refresh_every=2)
    state = tk.init_state(model, config, ADAM)
    group = None if rank is None else dist.group.WORLD
    step = tk.make_train_step(model, loss_fn, config, ADAM, compile=False, process_group=group)
    found = []
    for _ in range(3):
        state, metrics = step(state, (torch.ones(8, 6), torch.ones(8, 3)))
        found.append(metrics.aux["errors"])
    return [*found, tk.dense_params(state)["0.weight"]]


def _of_words(apply: Callable[..., Tensor], batch: dict[str, Tensor]) -> Tensor:
    errors = (apply(batch["x"]) - 1.0).square().mean(-1)
    return (errors * batch["mask"]).sum() / batch["mask"].sum()


def _padded(rank: int | None) -> dict[str, Tensor]:
    model, config = network(), tk.TopKastConfig(0.8, 0.5)
    state = tk.init_state(model, config, ADAM)
    options: dict[str, Any] = {}
    if rank is not None:
        options = {"process_group": dist.group.WORLD, "samples": lambda b: b["mask"].sum()}
    step = tk.make_train_step(model, _of_words, config, ADAM, compile=False, **options)
    chance = torch.Generator().manual_seed(4)
    for shares in ((3, 1), (2, 0), (1, 4)):
        x = torch.randn(2, 5, 6, generator=chance)
        mask = torch.stack([(torch.arange(5) < share).float() for share in shares])
        part = slice(None) if rank is None else slice(rank, rank + 1)
        state, _ = step(state, {"x": x[part], "mask": mask[part], "scale": torch.tensor(1.0)})
    return tk.dense_params(state)


PHASES = (0, 0, 1, 1, 2, 0)


def _changing(rank: int | None, compile: Any, steps: int = len(PHASES)) -> list[dict[str, Tensor]]:
    """Return what comes with the loss, by step, of other keys, numbers and dtypes at some."""
    torch.manual_seed(1)
    model, config, phase = nn.Linear(6, 3).double(), tk.TopKastConfig(0.8, 0.5), 0

    def loss(apply: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Any:
        errors = (apply(batch[0]) - batch[1]).detach().square().mean(1)
        told = {"mean": errors.mean()}
        if phase == 1:
            told |= {"narrow": errors.float().mean(), "twice": 2 * errors.mean()}
        if phase == 2:
            told = {"half": errors.mean() / 2}
        return loss_fn(apply, batch)[0], told

    group = None if rank is None else dist.group.WORLD
    step = tk.make_train_step(model, loss, config, ADAM, compile=compile, process_group=group)
    state, found = tk.init_state(model, config, ADAM), []
    for number, (*batch, (first, _)) in enumerate(batches(steps, ((5, 3),))):
        phase = PHASES[number]
        part = {None: slice(None), 0: slice(first), 1: slice(first, None)}[rank]
        state, metrics = step(state, tuple(tensor[part] for tensor in batch))
        found.append(metrics.aux)
    return found


def _particulars(rank: int) -> dict[str, Any]:
    found = {"normed": _train_normed(rank), "dropping": _dropping(rank), "padded": _padded(rank)}
    return found | {"changing": _changing(rank, False)}


@pytest.fixture(scope="module")
def particular() -> list[dict[str, Any]]:
    return results(_particulars)


def test_running_statistics_are_averaged_over_the_samples(particular: Any) -> None:
    one, (first, second) = _train_normed(None), (found["normed"] for found in particular)
    assert_close(tk.dense_params(first[-1]), tk.dense_params(one[-1]))
    assert_close(tk.masks_of(first[-1]), tk.masks_of(one[-1]))
    for number, (before, after) in enumerate(pairwise(first)):
        due = number > 0 and number % 4 == 0
        alpha = tk.forward_params(tk.refresh(before, NORMED) if due else before)
        outputs = [x @ alpha["0.weight"].T + alpha["0.bias"] for x, _ in _parts(number) if len(x)]
        for name, of in (("1.running_mean", torch.mean), ("1.running_var", torch.var)):
            mean = torch.stack([len(out) / 8 * of(out, 0) for out in outputs]).sum(0)
            assert_close(after.buffers[name], 0.9 * before.buffers[name] + 0.1 * mean)
    assert int(first[-1].buffers["1.num_batches_tracked"]) == STEPS
    assert_close(second[-1], first[-1], rtol=0.0, atol=0.0)


def test_dropout_differs_by_rank_and_the_sets_do_not(particular: Any) -> None:
    first, second = (found["dropping"] for found in particular)
    for own, other in zip(first[:-1], second[:-1], strict=True):
        assert not torch.equal(own, other)
    assert torch.equal(first[-1], second[-1])
    assert torch.equal(first[0], _dropping(None)[0])


def test_numbers_beside_the_loss_are_averaged_when_they_change_too(
    particular: Any, compiled: Any
) -> None:
    one = _changing(None, False)
    assert [len(told) for told in one] == [1, 1, 3, 3, 1, 1]
    for found in particular:
        assert_close(found["changing"], one)
    for *_, told in compiled:
        assert_close(told, one[: len(told)])


def test_batches_count_as_samples_says(particular: Any) -> None:
    first, second = (found["padded"] for found in particular)
    assert_close(first, _padded(None))
    assert_close(second, first, rtol=0.0, atol=0.0)
