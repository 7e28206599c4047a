"""A state of which one part does not go with the others is refused by name, wherever it is given.

So is what is no state at all.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import topkast_func as tk
from topkast_func import TrainState
from topkast_func.storage.index import MADE, tensors_of
from topkast_func.storage.sound import is_sound
from topkast_func.training import watch, whole
from topkast_func.training.state import Part

CONFIG, OPTIMIZER = tk.TopKastConfig(0.75, 0.5, sparse=("0.weight", "1.weight")), tk.adam(1e-3)
FIRST, SECOND, DENSE = "0.weight", "1.weight", "2.weight"
NUMBER = torch.ones(())

Damage = Callable[[Any], Any]
NONE = tk.Masks(torch.ones(2).bool(), torch.ones(2).bool())


def loss(apply: Any, batch: Tensor) -> Tensor:
    return (apply(batch) ** 2).mean()


class Net(nn.Sequential):
    """A network of which a kernel computes the first weight, and none the second."""

    def __init__(self) -> None:
        layers = [nn.Linear(8, 12), nn.Embedding(6, 8), nn.Linear(12, 4), nn.BatchNorm1d(4)]
        super().__init__(*layers)
        self[2].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        first, words, last, norm = self
        looked_up = words(torch.arange(len(x)) % 6).mean()
        return norm(last(first(x))) + looked_up


def made(storage: Any = "compact") -> tuple[nn.Module, TrainState]:
    torch.manual_seed(0)
    model = Net()
    return model, tk.init_state(model, CONFIG, OPTIMIZER, storage=storage)


def with_tree(path: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Return what changes a tree of a state."""

    def damage(state: Any) -> Any:
        first, *rest = path.split(".")
        part: Any = getattr(state, first)
        if not rest:
            return state._replace(**{first: change(dict(part))})
        if rest == ["slots"]:
            slots = {kind: change(dict(tree)) for kind, tree in part.slots.items()}
            return state._replace(optimizer=part._replace(slots=slots))
        inner = part._replace(**{rest[0]: change(dict(getattr(part, rest[0])))})
        return state._replace(**{first: inner})

    return damage


def put(path: str, name: Any, value: Any) -> Damage:
    return with_tree(path, lambda tree: {**tree, name: value})


def mapped(path: str, name: str, change: Callable[[Any], Any]) -> Damage:
    return with_tree(path, lambda tree: {**tree, name: change(tree[name])})


def left_out(path: str, name: str) -> Damage:
    return with_tree(path, lambda tree: {n: t for n, t in tree.items() if n != name})


def absent(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def numbers(field: str, change: Callable[[Tensor], Tensor]) -> Damage:
    """Return what changes the numbers of a tensor in the index of the first or second weight."""

    def changed(sets: Any) -> Any:
        first, *rest = field.split(".")
        part = getattr(sets, first)
        inner = part._replace(**{rest[0]: change(getattr(part, rest[0]))}) if rest else change(part)
        return sets._replace(**{first: inner})

    in_kernel = "." in field or field == "places"
    tree, name = ("patterns", FIRST) if in_kernel else ("positions", SECOND)
    return mapped(f"weights.{tree}", name, changed)


def with_last(value: int) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.cat([t[:-1], t.new_tensor([value])])


def seed(value: Tensor) -> Damage:
    return lambda state: state._replace(seed=value)


BOTH: dict[str, Damage] = {
    "narrow of unknown": put("narrow", "x", torch.empty(0, dtype=torch.float16)),
    "narrow of entries": put("narrow", FIRST, torch.ones(1, dtype=torch.float16)),
    "narrow is wider": put("narrow", FIRST, torch.empty(0, dtype=torch.float64)),
    "exponents of unknown": put("exponents", "x", torch.tensor(2.0, dtype=torch.float64)),
    "exponents below one": put("exponents", FIRST, torch.tensor(0.5, dtype=torch.float64)),
    "exponents in float32": put("exponents", FIRST, torch.tensor(2.0)),
    "exponents of a shape": put("exponents", FIRST, torch.full((2,), 2.0, dtype=torch.float64)),
    "exponents without values": put(
        "exponents", FIRST, torch.empty((), dtype=torch.float64, device="meta")
    ),
    "slot of unknown": put("optimizer.slots", "x", NUMBER),
    "slot of no text": put("optimizer.slots", 3, NUMBER),
    "slot that is sparse": put("optimizer.slots", FIRST, torch.eye(3).to_sparse()),
    "slots of no text": lambda s: s._replace(optimizer=s.optimizer._replace(slots={3: {}})),
    "frozen and trained": put("frozen", FIRST, torch.ones(12, 8)),
    "frozen without values": mapped("frozen", "2.bias", absent),
    "frozen of half a character": put("frozen", "\ud800", NUMBER),
    "buffer and trained": put("buffers", DENSE, torch.ones(4, 12)),
    "buffer and frozen": put("buffers", "2.bias", torch.ones(4)),
    "buffer without values": mapped("buffers", "3.running_mean", absent),
    "buffer of no text": put("buffers", 3, NUMBER),
    "seeds": seed(torch.ones(2, dtype=torch.int64)),
    "split of unknown": put("split", "x", Part(torch.ones(2).long(), NUMBER, {})),
    "split of nothing": put(
        "split",
        FIRST,
        Part(*[None] * 3),  # type: ignore[arg-type]
    ),
}
COMPACT: dict[str, Damage] = {
    "no values": lambda s: s._replace(weights=s.weights._replace(values={})),
    "values without": left_out("weights.values", FIRST),
    "values in float64": mapped("weights.values", FIRST, Tensor.double),
    "values of integers": mapped("weights.values", DENSE, Tensor.int),
    "values cut": mapped("weights.values", FIRST, lambda t: t[:-1]),
    "values cut, no kernel": mapped("weights.values", SECOND, lambda t: t[:-1]),
    "values of a shape": mapped("weights.values", FIRST, lambda t: t[:, None]),
    "values in no blocks": mapped("weights.values", FIRST, lambda t: t[:, None, None][:, :, :0]),
    "values in blocks": mapped("weights.values", FIRST, lambda t: t.view(-1, 1, 1).repeat(1, 5, 1)),
    "values without numbers": mapped("weights.values", DENSE, absent),
    "values without numbers, sparse": mapped("weights.values", FIRST, absent),
    "theta of unknown": put("weights.theta", "x", torch.ones(2, 2)),
    "theta without": left_out("weights.theta", FIRST),
    "theta in float64": mapped("weights.theta", FIRST, Tensor.double),
    "theta of one axis": mapped("weights.theta", FIRST, Tensor.flatten),
    "theta of other rows": mapped("weights.theta", FIRST, lambda t: t[:-1]),
    "theta that is sparse": mapped("weights.theta", FIRST, Tensor.to_sparse),
    "theta that is empty": mapped("weights.theta", FIRST, lambda t: t[:0]),
    "patterns without": left_out("weights.patterns", FIRST),
    "positions without": left_out("weights.positions", SECOND),
    "positions in int32": mapped(
        "weights.positions", SECOND, lambda p: p._replace(forward=p.forward.int())
    ),
    "positions of nothing": mapped(
        "weights.positions", SECOND, lambda p: p._replace(forward=None)
    ),
    "positions cut": mapped(
        "weights.positions", SECOND, lambda p: p._replace(exploring=p.exploring[1:])
    ),
    "a pattern in int64": mapped(
        "weights.patterns", FIRST, lambda p: p._replace(places=p.places.long())
    ),
    "a pattern cut": mapped(
        "weights.patterns", FIRST, lambda p: p._replace(places=p.places[1:])
    ),
    "a pattern of other rows": mapped(
        "weights.patterns",
        FIRST,
        lambda p: p._replace(forward=p.forward._replace(pointers=p.forward.pointers[1:])),
    ),
    "a pattern of nothing": mapped(
        "weights.patterns", FIRST, lambda p: p._replace(forward=(3, 4))
    ),
    "pattern and positions": lambda s: s._replace(
        weights=s.weights._replace(
            positions={**s.weights.positions, FIRST: s.weights.positions[SECOND]}
        )
    ),
    "places doubled": numbers("forward", lambda t: t * 2),
    "a place twice": numbers("forward", lambda t: torch.cat([t[:1], t[:-1]])),
    "places backwards": numbers("forward", lambda t: t.flip(0)),
    "a place below": numbers("forward", lambda t: torch.cat([-t[:1] - 1, t[1:]])),
    "a place beyond": numbers("exploring", with_last(10**12)),
    "places of A": mapped(
        "weights.positions", SECOND, lambda p: p._replace(exploring=p.forward[: len(p.exploring)])
    ),
    "a pattern doubled": mapped("weights.patterns", FIRST, lambda p: tree_map(lambda t: t * 2, p)),
    "a column beyond": numbers("forward.columns", with_last(10**9)),
    "a column below": numbers("exploring.columns", with_last(-1)),
    "columns of A": mapped("weights.patterns", FIRST, lambda p: p._replace(
        exploring=p.forward._replace(columns=p.forward.columns[: p.exploring_count])
    )),
    "columns backwards": numbers("forward.columns", lambda t: t.flip(0)),
    "rows from the second on": numbers("forward.pointers", lambda t: t + (t == 0).int()),
    "rows that end before they start": numbers("exploring.pointers", lambda t: t.flip(0)),
    "rows beyond": numbers("forward.pointers", with_last(10**9)),
    "rows that end early": numbers("forward.pointers", with_last(0)),
    "another transpose": numbers("transposed.columns", lambda t: t.flip(0)),
    "other values": numbers("places", lambda t: t.flip(0)),
}  # fmt: skip
ONLY_DENSE: dict[str, Damage] = {
    "sets of unknown": put("weights.sets", "x", NONE),
    "sets in float": mapped("weights.sets", FIRST, lambda m: tk.Masks(*(x.float() for x in m))),
    "sets of a shape": mapped("weights.sets", FIRST, lambda m: tk.Masks(*(x[:-1] for x in m))),
    "A beyond B": mapped("weights.sets", FIRST, lambda m: tk.Masks(m.backward, m.forward)),
    "sets of nothing": mapped("weights.sets", FIRST, lambda m: m._replace(forward=None)),
    "sets without values": mapped("weights.sets", FIRST, lambda m: tk.Masks(*map(absent, m))),
    "theta of integers": mapped("weights.theta", FIRST, Tensor.int),
    "theta without numbers": mapped("weights.theta", FIRST, absent),
    "no theta": lambda s: s._replace(weights=s.weights._replace(theta={})),
}  # fmt: skip


def cases() -> Iterator[Any]:
    for storage, others in (("compact", COMPACT), ("dense", ONLY_DENSE)):
        for name, damage in {**BOTH, **others}.items():
            yield pytest.param(storage, damage, id=f"{storage}: {name}")


def step(model: nn.Module, state: TrainState) -> Any:
    return tk.make_train_step(model, loss, CONFIG, OPTIMIZER, compile=False)(state, BATCH)


WORDS = r"^state(\.| is not whole: .*init_state)"
BATCH = torch.ones(3, 8)
USES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "step": step,
    "refresh": lambda _, s: tk.refresh(s, CONFIG),
    "dense_params": lambda _, s: tk.dense_params(s),
    "forward_params": lambda _, s: tk.forward_params(s),
    "masks_of": lambda _, s: tk.masks_of(s),
    "gather": lambda _, s: tk.gather(s),
    "save": lambda _, s: tk.save(s, Path("never.pt")),
    "save_sharded": lambda _, s: tk.save_sharded(s, Path("never")),
    "async_save_sharded": lambda _, s: tk.async_save_sharded(s, Path("never")),
    "summary": lambda _, s: tk.summary(s),
    "explain": lambda _, s: tk.explain(s),
    "to_sparse": lambda _, s: tk.to_sparse(s),
    "sparse_module": lambda model, s: tk.sparse_module(s, model),
    "dense_gradients": lambda model, s: tk.dense_gradients(model, loss, s, BATCH),
    "training_flops": lambda model, s: tk.training_flops(model, s, BATCH),
    "train": lambda model, s: tk.train(
        tk.make_train_step(model, loss, CONFIG, OPTIMIZER, compile=False), s, [BATCH], CONFIG
    ),
    "on_refresh": lambda _, s: tk.History().on_refresh(s, s),
}


@pytest.mark.parametrize(("storage", "damage"), [*cases()])
def test_a_part_that_does_not_go_with_the_others_is_named(storage: str, damage: Damage) -> None:
    model, state = made(storage)
    damaged = damage(state)
    for use in USES.values():
        with pytest.raises((TypeError, ValueError), match=WORDS) as info:
            use(model, damaged)
        assert type(info.value) in (TypeError, ValueError)
    assert repr(damaged).startswith("TrainState(state")


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(
    "other",
    [None, torch.ones(2), {"0.weight": torch.ones(2)}, made],
    ids=lambda o: type(o).__name__,
)
def test_what_is_no_state_is_told_what_one_is(other: Any, use: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"state must be a TrainState, got .* what init_state"):
        use(Net(), other)


BY_MEMBER = "step", "refresh", "dense_params", "forward_params", "masks_of", "dense_gradients"
"""What returns tensors, so that `torch.vmap` maps it over an ensemble."""


@pytest.mark.parametrize("storage", ["compact", "dense"])
def test_an_ensemble_is_read_by_member_or_named(storage: str) -> None:
    model, state = made(storage)
    stacked = tree_map(lambda leaf: torch.stack((leaf, leaf)), state)
    for name, use in USES.items():
        over_members = torch.vmap(partial(use, model))
        if name in BY_MEMBER:
            found, expected = over_members(stacked), use(model, state)
            torch.testing.assert_close(tree_map(lambda leaf: leaf[1], found), expected)
        elif name != "train":
            with pytest.raises(ValueError, match=r"^state is one of an ensemble .* take a member"):
                over_members(stacked)


@pytest.mark.parametrize("what", [absent, lambda step: FakeTensorMode().from_tensor(step)])
def test_a_counter_without_a_number_is_named(what: Callable[[Tensor], Tensor]) -> None:
    _, state = made()
    with pytest.raises(ValueError, match=r"^state.step has no number that could be read"):
        tk.masks_of(state._replace(step=what(state.step)))


def test_a_state_that_is_damaged_between_steps_is_named() -> None:
    model, state = made()
    train_step = tk.make_train_step(model, loss, CONFIG, OPTIMIZER, compile=False)
    for damage in {**BOTH, **COMPACT}.values():
        state, _ = train_step(state, BATCH)
        with pytest.raises((TypeError, ValueError), match=WORDS):
            train_step(damage(state), BATCH)


@pytest.mark.parametrize("inferred", [False, True])
@pytest.mark.parametrize(("storage", "tree"), [("compact", "patterns"), ("dense", "sets")])
def test_sets_that_are_written_to_are_looked_at_again(
    storage: str, tree: str, inferred: bool
) -> None:
    model, state = made(storage)
    with torch.inference_mode(inferred):
        state = tree_map(torch.clone, state)
    train_step = tk.make_train_step(model, loss, CONFIG, OPTIMIZER, compile=False)
    train_step(state, BATCH)
    kept = getattr(state.weights, tree)[FIRST].forward
    written = kept.columns if storage == "compact" else kept
    before = written.clone()
    with torch.inference_mode(inferred):
        written.fill_(1)
    for use in (tk.masks_of, lambda state: train_step(state, BATCH)):
        with pytest.raises(ValueError, match=WORDS):
            use(state)
    with torch.inference_mode(inferred):
        written.copy_(before)
    train_step(state, BATCH)


def test_an_index_that_was_copied_is_looked_at_once() -> None:
    _, state = made()
    index, shape = state.weights.patterns[FIRST], state.weights.theta[FIRST].shape
    copied = tree_map(torch.clone, index)
    held = tensors_of(copied)
    assert MADE.knows(tensors_of(index), ((1, 1), shape))
    assert not MADE.knows(held, ((1, 1), shape))
    assert is_sound(copied, (1, 1), shape)
    assert MADE.knows(held, ((1, 1), shape))
    assert not MADE.knows(held, ((1, 1), shape[::-1]))
    assert not MADE.knows([held[0], *map(torch.clone, held[1:])], ((1, 1), shape))


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_whole_is_not_looked_at_again(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state = made()
    look = Mock(side_effect=whole.check_whole)
    monkeypatch.setattr(watch, "check_whole", look)
    train_step = tk.make_train_step(model, loss, CONFIG, OPTIMIZER, compile=compiled)
    for _ in range(5):
        state, _ = train_step(state, BATCH)
    assert look.call_count == 1


def test_a_pass_of_shapes_alone_is_told_where_numbers_are_read(tmp_path: Path) -> None:
    model, state = made()
    params, masks = dict(model.named_parameters()), tk.masks_of(state)
    tk.save(state, tmp_path / "state", CONFIG)
    tk.save_sharded(state, tmp_path / "sharded", CONFIG)
    uses: list[Callable[[], Any]] = [
        *(partial(use, model, state) for use in USES.values()),
        lambda: tk.init_state(model, CONFIG, OPTIMIZER),
        lambda: tk.init_state(params, CONFIG, OPTIMIZER, storage="dense", masks=masks),
        lambda: tk.compute_masks(params, CONFIG),
        lambda: tk.load(tmp_path / "state"),
        lambda: tk.load_sharded(tmp_path / "sharded"),
        lambda: tk.exchanges(masks, masks),
        lambda: tk.index_masks(model, masks),
    ]
    for real in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=real) as mode:
            fake = mode.from_tensor(state.weights.values[DENSE])
            for use in uses:
                with pytest.raises(RuntimeError, match="under FakeTensorMode: call it before"):
                    use()
            assert "under FakeTensorMode" in repr(state)
    step(model, state)
    with pytest.raises(
        TypeError, match=r"values.* is a FakeTensor, which computes in a way of its"
    ):
        tk.refresh(put("weights.values", DENSE, fake)(state), CONFIG)


@pytest.mark.parametrize(
    ("storage", "tree"),
    [
        *product(["compact", "dense"], ["frozen", "buffers"]),
        *(("compact", f"weights.{tree}") for tree in ("values", "patterns", "positions")),
        *(("dense", f"weights.{tree}") for tree in ("theta", "sets")),
    ],
)
def test_what_was_made_in_inference_mode_trains_on(storage: str, tree: str) -> None:
    model, state = made(storage)
    with torch.inference_mode():
        same = with_tree(tree, partial(tree_map, torch.clone))(state)
    found, expected = (tk.dense_params(step(model, given)[0]) for given in (same, state))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    tk.refresh(same, CONFIG)
