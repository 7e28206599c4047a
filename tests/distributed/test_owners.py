"""Owners: a state in parts is trained as a whole one is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

import topkast_func as tk
from tests.distributed.processes import results
from tests.distributed.test_parallel import ADAM, batches, loss_fn, network
from topkast_func.distributed.batches import rows
from topkast_func.distributed.division import owners_of
from topkast_func.distributed.owners import Owners, from_owners, mean_at
from topkast_func.distributed.ranks import Ranks
from topkast_func.training.parts import part
from topkast_func.training.state import elsewhere
from topkast_func.types import changed

CONFIG = tk.TopKastConfig(0.8, 0.5, refresh_every=3, explore_until=7, penalty=None)
STEPS = 9


# --- parts -----------------------------------------------------------------------------------


def _start(**options: Any) -> tk.TrainState:
    return tk.init_state(network(), CONFIG, ADAM, **options)


def _steps(shard: Any = "owners", group: Any = None) -> Callable[..., tk.TrainState]:
    group = dist.group.WORLD if group is None else group
    step = tk.make_train_step(
        network(), loss_fn, CONFIG, ADAM, compile=False, process_group=group, shard=shard
    )

    def train(state: tk.TrainState, until: int) -> tk.TrainState:
        for number, (inputs, targets, _) in enumerate(batches(until)):
            if number >= int(state.step):
                state, _ = step(state, (inputs.float(), targets.float()))
        return state

    return train


def _here(state: tk.TrainState) -> dict[str, list[str]]:
    trees = {"theta": state.weights.theta, **state.optimizer.slots}
    return {
        kind: [name for name, tensor in tree.items() if not tensor.is_meta]
        for kind, tree in trees.items()
    }


def _bytes(state: tk.TrainState) -> int:
    return sum(row.bytes for row in tk.summary(state).rows)


def _told(work: Callable[[], Any]) -> str:
    try:
        return f"{work()}"
    except Exception as reason:
        return f"{type(reason).__name__}: {reason}"


def _flipped(state: tk.TrainState, name: str, where: bool) -> tk.TrainState:
    held = dict(state.weights.values)
    if where:
        held[name] = held[name].clone()
        held[name][0] += 1
    return state._replace(weights=changed(state.weights, values=held))


def _bit_flipped(rank: int) -> tk.TrainState:
    """Train, with a bit of what rank 1 alone has flipped in memory after a refresh."""
    train = _steps()
    state = train(_start(), 5)
    if rank == 1:
        own = next(theta for theta in state.weights.theta.values() if not theta.is_meta)
        own.view(torch.int32).view(-1)[7] ^= 1
    return train(state, STEPS)


def _with_nan(state: tk.TrainState, name: str) -> tk.TrainState:
    """Return a state whose owner has NaN outside of B, which no step reads."""
    theta = dict(state.weights.theta)
    if not theta[name].is_meta:
        outside = ~tk.masks_of(state)[name].backward
        theta[name] = torch.where(outside, torch.nan, theta[name])
    return state._replace(weights=changed(state.weights, theta=theta))


def _parts(rank: int, folder: Path) -> dict[str, Any]:
    train, plain = _steps(), _steps(None)
    middle, whole = train(_start(), 5), plain(_start(), 5)
    values = middle.weights.values
    found: dict[str, Any] = {
        "here": _here(middle),
        "forward": tk.forward_params(middle),
        "masks": tk.masks_of(middle),
        "whole": whole,
        "bytes": _bytes(middle),
        "views": [n for n, v in values.items() if v.untyped_storage().nbytes() > v.nbytes],
    }
    tk.save_sharded(middle, folder / "sharded", CONFIG)
    tk.async_save_sharded(middle, folder / "async", CONFIG).result()
    gathered = tk.gather(middle)
    found["gathered"] = gathered
    if rank == 0:
        tk.save(gathered, folder / "one", CONFIG)
    loaded = tk.load_sharded(folder / "async", CONFIG, network(), ADAM)
    ends = [tk.gather(train(state, STEPS)) for state in (middle, loaded, gathered)]
    found["ends"], found["end"] = ends, plain(whole, STEPS)
    other = next(name for name in middle.weights.theta if name in elsewhere(middle))
    first = next(iter(middle.weights.theta))
    found["errors"] = {
        "no group": _told(
            lambda: tk.make_train_step(network(), loss_fn, CONFIG, ADAM, shard="owners")
        ),
        "no such": _told(lambda: _steps("rows")),
        "dense": _told(lambda: _steps()(_start(storage="dense"), 1)),
        "plain": _told(lambda: _steps(None)(middle, 6)),
        "theta": _told(lambda: tk.dense_params(middle)),
        "refresh": _told(lambda: tk.refresh(middle, CONFIG)),
        "save": _told(lambda: tk.save(middle, folder / f"none{rank}")),
        "lost": _told(lambda: tk.gather(_lost(middle, first))),
        "flipped": _told(lambda: _steps()(_flipped(middle, first, rank == 1), 6)),
        "at rest": _told(lambda: _bit_flipped(rank)),
    }
    assert other not in found["here"]["theta"]
    due = train(middle, 6)
    with pytest.warns(UserWarning, match=f"no refresh before step 6: .*{first}.*NaN"):
        found["nan"] = tk.masks_of(train(_with_nan(due, first), 7)), tk.masks_of(due)
    return found


def _lost(state: tk.TrainState, name: str) -> tk.TrainState:
    theta = {n: t.to("meta") if n == name else t for n, t in state.weights.theta.items()}
    return state._replace(weights=changed(state.weights, theta=theta))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("owners")


@pytest.fixture(scope="module")
def pair(folder: Path) -> list[dict[str, Any]]:
    return results(_parts, folder)


def test_each_tensor_has_one_owner_and_all_ranks_have_alpha(pair: list[dict[str, Any]]) -> None:
    first, second = pair
    for kind in first["here"]:
        names = {"theta": first["masks"]}.get(kind, dict(network().named_parameters()))
        assert {*first["here"][kind]} | {*second["here"][kind]} == {*names}
        assert not {*first["here"][kind]} & {*second["here"][kind]}
    for found in (first, second):
        assert_close(found["forward"], tk.forward_params(found["whole"]), rtol=0.0, atol=0.0)
        assert_close(found["masks"], tk.masks_of(found["whole"]), rtol=0.0, atol=0.0)
        assert found["bytes"] < 0.85 * _bytes(found["whole"])
        assert not found["views"]  # of what has come, which would be held as long


def _same(one: tk.TrainState, other: tk.TrainState) -> None:
    """Compare states bit for bit, but for what θ at rest holds on B, which no one reads."""
    for read in (tk.dense_params, tk.masks_of, lambda s: (s[:3], s[4:], s.weights.values)):
        assert_close(read(one), read(other), rtol=0.0, atol=0.0)


def test_parts_are_gathered_and_saved_and_go_on_from_there(
    pair: list[dict[str, Any]], folder: Path
) -> None:
    for found in pair:
        _same(found["gathered"], found["whole"])
        for end in found["ends"]:
            _same(end, found["end"])
    for name in ("sharded", "async"):
        _same(tk.load_sharded(folder / name, CONFIG, network(), ADAM), pair[0]["whole"])
    _same(tk.load(folder / "one", CONFIG, network(), ADAM), pair[0]["whole"])


OTHERS = r"that of one rank of several, and others own \[.*\]: have gather\(state, process_group\)"
EXPECTED = {
    "no group": "ValueError: shard is for several processes: pass process_group or mesh too",
    "no such": "ValueError: shard must be 'owners' or None, got 'rows'",
    "dense": "ValueError: shard='owners' takes compact storage",
    **dict.fromkeys(("plain", "theta", "refresh", "save"), f"ValueError: the state is {OTHERS}"),
    "lost": r"ValueError: no rank of the group owns \['0.weight'\]",
    "flipped": r"RuntimeError: rank . of 2, step 5: rank 1 holds another state than rank 0, in 1 ",
    "at rest": (
        r"RuntimeError: (rank 1 of 2: RuntimeError: )?rank 1 of 2, step 6: θ of \['.*'\], which "
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_wrong_is_named_on_every_rank(name: str, pair: list[dict[str, Any]]) -> None:
    for found in pair:
        with pytest.raises(AssertionError, match=EXPECTED[name]):
            raise AssertionError(found["errors"][name])


def _rank(rank: int) -> Owners:
    ranks = Ranks(None)
    ranks.rank, ranks.size = rank, 2
    return Owners(ranks, rows, ())


def test_the_part_of_another_rank_is_an_error() -> None:
    state = _start()
    first = part(_rank(0), CONFIG, state)
    assert part(_rank(0), CONFIG, first) is first
    assert not elsewhere(state)
    with pytest.raises(ValueError, match=r"rank is to own \['2.weight', .* part of another"):
        part(_rank(1), CONFIG, first)


def test_nan_at_one_owner_keeps_the_sets_on_all_ranks(pair: list[dict[str, Any]]) -> None:
    for found in pair:
        after, before = found["nan"]
        assert_close(after, before, rtol=0.0, atol=0.0)


# --- what is sent ----------------------------------------------------------------------------

SHARES = (0.5, 0.0, 0.5)
OWNERS = (2, 0, 2, 0, 2)  # rank 1 has none
BOUNDS = ((0, 0, 0, 6), (0, 1, 1, 1), (0, 0, 0, 4), (0, 5, 5, 5), (0, 0, 0, 6))
SPLIT = ((0, 2, 4, 6), (0, 0, 1, 1), (0, 3, 3, 4), (0, 1, 3, 5), (0, 2, 4, 6))


def _tensors(rank: int) -> list[Tensor]:
    chance = torch.Generator().manual_seed(rank)
    tensors = [torch.randn(3, 2, generator=chance), torch.randn((), generator=chance)]
    tensors += [torch.randn(4, generator=chance).double(), torch.randn(5, generator=chance)]
    whole = [*tensors, torch.complex(tensors[0], tensors[0] + 1)]
    return [tensor * torch.nan for tensor in whole] if rank == 1 else whole


def _exchanged(rank: int) -> list[tuple[list[Tensor], list[Tensor]]]:
    ranks, share = Ranks(dist.group.WORLD), torch.tensor(SHARES[rank]).double()
    tensors = _tensors(rank)
    return [
        (mean_at(ranks, bounds, share, tensors), from_owners(ranks, bounds, tensors))
        for bounds in (BOUNDS, SPLIT)
    ]


def test_means_are_at_their_owners_and_tensors_come_from_them() -> None:
    every, found = [_tensors(rank) for rank in range(3)], results(_exchanged, ranks=3)
    for rank, (whole, _) in enumerate(found):
        for place, owner in enumerate(OWNERS):
            mean = (every[0][place] + every[2][place]) / 2
            assert_close(whole[1][place], every[owner][place], rtol=0.0, atol=0.0, equal_nan=True)
            assert_close(whole[0][place], mean if rank == owner else mean.flatten()[:0])
    for rank, (_, (means, given)) in enumerate(found):
        for place, bounds in enumerate(SPLIT):
            own = slice(*bounds[rank : rank + 2])
            mean = ((every[0][place] + every[2][place]) / 2).flatten()[own]
            assert_close(means[place].flatten(), mean)
            parts = [
                every[other][place].flatten()[slice(*bounds[other : other + 2])]
                for other in range(3)
            ]
            sent = torch.cat(parts).view(every[0][place].shape)
            assert_close(given[place], sent, rtol=0.0, atol=0.0, equal_nan=True)


def test_owners_have_about_as_much_each() -> None:
    sizes = {f"{number}": 1 + number * number % 37 for number in range(40)}
    owners = owners_of(sizes, 4)
    loads = [sum(sizes[n] for n, rank in owners.items() if rank == own) for own in range(4)]
    assert max(loads) - min(loads) <= max(sizes.values()) / 4
    assert list(owners) == list(sizes)
    assert owners_of({"a": 1}, 3) == {"a": 0}


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_what_keeps_owners_from_a_fair_share_is_split(ranks: int) -> None:
    sizes = {"head": 900, "body": 100, "a": 40, "b": 30, "c": 2}
    owners = owners_of(sizes, ranks)
    assert owners["head"] is None
    loads = [sum(sizes[n] for n, own in owners.items() if own == rank) for rank in range(ranks)]
    split = sum(sizes[name] for name, own in owners.items() if own is None)
    assert (max(loads) + split / ranks) * ranks <= 1.1 * sum(sizes.values())
    whole = owners_of(sizes, ranks, {"head"})
    assert whole["head"] == 0
    assert owners_of({"a": 11, "b": 10}, 2) == {"a": 0, "b": 1}
    assert owners_of({"a": 9, "b": 9, "c": 9}, 2) == {"a": None, "b": 0, "c": 1}
