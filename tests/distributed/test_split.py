"""Tensors too large for one owner: split among all ranks, they are trained as whole ones are."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import topkast_func as tk
from tests.distributed.processes import results
from tests.distributed.test_parallel import COMPILED, TWO_SHAPES, Trained, batches, loss_fn, trained
from tests.optimizers import EVERY
from topkast_func.distributed.batches import rows
from topkast_func.distributed.owners import Owners
from topkast_func.distributed.ranges import top_over
from topkast_func.distributed.ranks import Ranks
from topkast_func.ranking import largest_among, ranked_by, top_sets
from topkast_func.training.parts import part

ADAM = tk.adamw(lr=0.01)
CONFIG = tk.TopKastConfig(0.8, 0.5, refresh_every=4, explore_until=15)
LARGE = "2.weight"


def network() -> nn.Sequential:
    torch.manual_seed(1)
    parts = (nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3))
    return nn.Sequential(*parts)


def tied() -> nn.Sequential:
    """Return a network with weights of few magnitudes, 0 among them."""
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 16).round() / 16)
    return model


CASES: dict[str, dict[str, Any]] = {
    "topkast": {},
    "threshold": {"config": replace(CONFIG, method=tk.topkast("threshold", exchange=0.2))},
    "staged": {"config": replace(CONFIG, forward_sparsity=tk.staged({0: 0.5, 7: 0.8}))},
    "dense": {"config": replace(CONFIG, keep_dense=["2.*"])},
    "tied": {"model": tied, "optimizer": tk.sgd(lr=1e-9)},
    "value": {"config": replace(CONFIG, method=tk.topkast("value", exchange=None))},
    "ste": {"config": replace(CONFIG, method=tk.ste(), refresh_every=2)},
    "gmp": {"config": replace(CONFIG, method=tk.gmp(2, 10))},
    "powerprop": {"config": replace(CONFIG, powerprop=2.0)},
    "momentum": {"optimizer": EVERY["momentum"], "steps": 9},
    "clipped": {"optimizer": EVERY["clipped"], "steps": 9},
    "gathered": {"optimizer": EVERY["gathered"], "steps": 9},
}
RANKS = {2: [*CASES], 3: ["topkast", "threshold", "staged", "dense", "tied"]}


def _trained(rank: int | None, name: str, **others: Any) -> Trained:
    options: dict[str, Any] = {"model": network, "config": CONFIG}
    return trained(rank, **options | CASES[name] | others)


@cache
def alone(name: str) -> Trained:
    return _trained(None, name)


# --- training --------------------------------------------------------------------------------


def _cases(rank: int) -> dict[str, Trained]:
    names = RANKS[dist.get_world_size()]
    return {name: _trained(rank, name, shard="owners") for name in names}


@pytest.fixture(scope="module")
def groups() -> dict[int, list[dict[str, Trained]]]:
    return {size: results(_cases, ranks=size) for size in RANKS}


@pytest.mark.parametrize(("size", "name"), [(s, n) for s, names in RANKS.items() for n in names])
def test_split_tensors_train_as_in_one_process(
    size: int, name: str, groups: dict[int, list[dict[str, Trained]]]
) -> None:
    one, (first, *others) = alone(name), (found[name] for found in groups[size])
    assert_close(first, one)
    start = CASES[name].get("model", network)().double().get_parameter(LARGE)
    assert one.refreshes > 0
    assert not torch.equal(one.theta[LARGE], start)
    if LARGE in one.masks:
        before = tk.compute_masks({LARGE: start}, CONFIG)[LARGE]
        assert not torch.equal(one.masks[LARGE].forward, before.forward)
    for other in others:
        assert_close(other, first, rtol=0.0, atol=0.0)


BARE = replace(CONFIG, penalty=None)


def _bits(rank: int) -> tuple[list[Trained], tuple[Trained, int, int]]:
    both = [
        _trained(rank, "topkast", config=BARE, dtype=torch.float32, shard=shard)
        for shard in (None, "owners")
    ]
    counters.clear()
    cycle = {"steps": 10, "cycle": TWO_SHAPES, "compile": COMPILED}
    ran = _trained(rank, "topkast", shard="owners", **cycle)
    return both, (ran, len(counters["graph_break"]), counters["stats"]["unique_graphs"])


def test_bits_are_those_of_replicas_and_refreshes_compile_nothing() -> None:
    one = _trained(None, "topkast", steps=10, cycle=TWO_SHAPES)
    for rank, ((replica, owned), (ran, breaks, graphs)) in enumerate(results(_bits)):
        assert_close(owned, replica, rtol=0.0, atol=0.0)
        assert_close(ran, one)
        assert (breaks, graphs) == (0, 1 + rank)  # a graph for each shape of batch


# --- ranking ---------------------------------------------------------------------------------


def _scores(trial: int) -> Tensor:
    chance = torch.Generator().manual_seed(trial)
    size, dtype = (7, 300, 5000)[trial % 3], (torch.float32, torch.float64)[trial % 2]
    scores = torch.randn(size, generator=chance, dtype=dtype)
    return [scores, (scores * 3).round() / 3, torch.zeros_like(scores), scores * 1e-30][trial % 4]


def _ranked(rank: int) -> list[int]:
    """Return in which trials the ranks choose others than one process does."""
    ranks, wrong = Ranks(dist.group.WORLD), list[int]()
    for trial in range(24):
        scores, size = _scores(trial), dist.get_world_size()
        n = scores.numel()
        own = slice(n * rank // size, n * (rank + 1) // size)
        among = torch.rand(n, generator=torch.Generator().manual_seed(trial)) < 0.5
        among[0] = True
        counts, some = (math.ceil(n / 10), math.ceil(n / 5)), max(1, int(among.sum()) // 3)
        whole = (*top_sets("w", scores, *counts), largest_among("w", among, scores, some))
        with ranked_by(partial(top_over, ranks, own.start)):
            sets = top_sets("w", scores[own], *counts)
            chosen = (*sets, largest_among("w", among[own], scores[own], some))
        if not all(torch.equal(c, w[own]) for c, w in zip(chosen, whole, strict=True)):
            wrong.append(trial)
    return wrong


def test_ranges_are_ranked_as_the_whole_is_ties_included() -> None:
    assert results(_ranked, ranks=3) == [[]] * 3


# --- parts -----------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What a rank of several found."""

    split: list[str]
    bytes: int
    whole: tk.TrainState
    gathered: tk.TrainState
    loaded: list[tk.TrainState]
    ends: list[Any]
    told: dict[str, str]
    masks: tuple[Any, Any]


def _step(rank: int, shard: Any = "owners", config: tk.TopKastConfig = BARE) -> Callable[..., Any]:
    step = tk.make_train_step(
        network(),
        loss_fn,
        config,
        ADAM,
        compile=False,
        process_group=dist.group.WORLD,
        shard=shard,
    )

    def train(state: tk.TrainState, until: int) -> tk.TrainState:
        for number, (inputs, targets, (first, _)) in enumerate(batches(until)):
            own = [slice(first), slice(first, None)][rank] if rank < 2 else slice(0)
            if number >= int(state.step):
                state, _ = step(state, (inputs[own].float(), targets[own].float()))
        return state

    return train


def _start() -> tk.TrainState:
    return tk.init_state(network(), BARE, ADAM)


def _bytes(state: tk.TrainState) -> int:
    """Return the bytes of θ at rest and slots that are here."""
    parts = [(part.theta, part.slots) for part in state.split.values()]
    trees = (state.weights.theta, state.optimizer.slots, parts)
    return sum(leaf.nbytes for leaf in tree_leaves(trees) if not leaf.is_meta)


def _error(work: Callable[[], Any]) -> str:
    try:
        return f"{work()}"
    except Exception as reason:
        return f"{type(reason).__name__}: {reason}"


def _with(state: tk.TrainState, **new: Any) -> tk.TrainState:
    part = state.split[LARGE]._replace(**new)
    return state._replace(split={**state.split, LARGE: part})


def _flipped(rank: int) -> tk.TrainState:
    """Train, with a bit of what the last rank alone has flipped in memory after a refresh."""
    train = _step(rank)
    state = train(_start(), 5)
    if rank == dist.get_world_size() - 1:
        state.split[LARGE].theta.view(torch.int32)[7] ^= 1
    return train(state, 9)


def _parts(rank: int, folder: Path) -> Parts:
    train, plain, size = _step(rank), _step(rank, None), dist.get_world_size()
    middle, whole = train(_start(), 6), plain(_start(), 6)
    tk.save_sharded(middle, folder / f"sharded{size}", BARE)
    tk.async_save_sharded(middle, folder / f"async{size}", BARE).result()
    dist.barrier()
    loaded = [
        tk.load_sharded(path, BARE, network(), ADAM)
        for path in sorted(folder.iterdir())
        if path.is_dir()
    ]
    ends = [tk.gather(train(state, 13)) for state in (middle, *loaded)]
    half = dist.new_group([0, 1])
    place = middle.split[LARGE].place
    told = {
        "plain": _error(lambda: plain(middle, 7)),
        "dense": _error(lambda: tk.dense_params(middle)),
        "foreign": _error(lambda: train(_with(middle, place=(place + 1) % size), 7)),
        "whole": _error(lambda: _step(rank, config=replace(BARE, method=tk.set()))(middle, 7)),
        "lost": _error(lambda: tk.gather(_with(middle, place=place * 0))),
        "save": _error(lambda: tk.save_sharded(_with(middle, place=place * 0), folder / "none")),
        "flipped": _error(lambda: _flipped(rank)),
    }
    if rank < 2 and size > 2:
        told["group"] = _error(lambda: tk.gather(middle, half))
    due = train(middle, 8)
    theta = due.split[LARGE].theta
    poor = _with(due, theta=torch.full_like(theta, torch.nan)) if rank == 1 else due
    with pytest.warns(UserWarning, match=f"no refresh before step 8: .*{LARGE}.*NaN"):
        masks = tk.masks_of(_step(rank)(poor, 9)), tk.masks_of(due)
    found = ends, plain(whole, 13)
    return Parts(
        [*middle.split], _bytes(middle), whole, tk.gather(middle), loaded, [*found], told, masks
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("split")


@pytest.fixture(scope="module")
def parted(folder: Path) -> dict[int, list[Parts]]:
    return {size: results(_parts, folder, ranks=size) for size in (2, 3)}


def _rank(rank: int, size: int) -> Owners:
    ranks = Ranks(None)
    ranks.rank, ranks.size = rank, size
    return Owners(ranks, rows, ())


@pytest.mark.parametrize("keep_dense", [(), ("1.weight",)])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_ranks_have_about_as_many_bytes(size: int, keep_dense: tuple[str, ...]) -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4000, bias=False))
    config = replace(BARE, keep_dense=keep_dense)
    whole = tk.init_state(model, config, ADAM)
    numbers = [_bytes(part(_rank(rank, size), config, whole)) for rank in range(size)]
    assert max(numbers) < 1.05 * min(numbers)
    assert sum(numbers) == _bytes(whole)


def test_parts_have_no_more_together_than_the_whole(parted: dict[int, list[Parts]]) -> None:
    for found in parted.values():
        assert all(LARGE in own.split for own in found)
        assert sum(own.bytes for own in found) == _bytes(found[0].whole)


def _same(one: tk.TrainState, other: tk.TrainState) -> None:
    """Compare states bit for bit, but for what θ at rest holds on B, which no one reads."""
    for read in (tk.dense_params, tk.masks_of, lambda s: (s[:3], s[4:], s.weights.values)):
        assert_close(read(one), read(other), rtol=0.0, atol=0.0)
    assert [*tk.dense_params(one)] == [*tk.dense_params(other)]


@pytest.mark.parametrize("size", [2, 3])
def test_split_states_are_gathered_saved_and_go_on_with_any_number_of_ranks(
    size: int, parted: dict[int, list[Parts]]
) -> None:
    for found in parted[size]:
        _same(found.gathered, found.whole)
        assert len(found.loaded) == 2 * (size - 1)  # three load what two have saved
        ends, end = found.ends
        for own in ends:
            _same(own, end)
        for state in found.loaded[:2]:
            _same(state, found.whole)


def test_one_process_loads_what_several_have_split(
    folder: Path, parted: dict[int, list[Parts]]
) -> None:
    for size, (first, *_) in parted.items():
        _same(tk.load_sharded(folder / f"sharded{size}", BARE, network(), ADAM), first.whole)


TOLD = {
    "plain": "ValueError: the state is that of one rank of several",
    "dense": "ValueError: the state is that of one rank of several",
    "foreign": rf"ValueError: this rank is to own \['{LARGE}'\], or as it may be a part of each",
    "whole": rf"ValueError: this rank is to own \[.*'{LARGE}'",
    "lost": rf"ValueError: no rank of the group owns all parts of \['{LARGE}'\]",
    "save": rf"ValueError: no rank of the group owns all parts of \['{LARGE}'\]",
    "flipped": rf"RuntimeError: .*step 8: θ of \['{LARGE}'\], which this rank owns, is not what",
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", TOLD)
def test_what_is_wrong_with_a_part_is_told(
    name: str, size: int, parted: dict[int, list[Parts]]
) -> None:
    for found in parted[size]:
        with pytest.raises(AssertionError, match=TOLD[name]):
            raise AssertionError(found.told[name])


def test_a_smaller_group_does_not_have_all_parts(parted: dict[int, list[Parts]]) -> None:
    for found in parted[3][:2]:
        assert "no rank of the group owns all parts of" in found.told["group"]


def test_nan_in_the_range_of_a_rank_keeps_the_sets_on_all(parted: dict[int, list[Parts]]) -> None:
    for found in (own for group in parted.values() for own in group):
        after, before = found.masks
        assert_close(after, before, rtol=0.0, atol=0.0)
