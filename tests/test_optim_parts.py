"""Optimisers that are put together: chains, accumulation, groups; in every kind of run."""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import topkast_func as tk
from tests.optimizers import EVERY, TOGETHER, halving
from tests.small_runs import drawn, mse, network, run, same
from tests.storage import STORAGES, dense_slots
from topkast_func.types import Params

Tree = dict[str, Tensor]

PAPER = tk.topkast("value", exchange=None)
CONFIG = tk.TopKastConfig(0.7, 0.4, refresh_every=2, method=PAPER)
BLOCKS = tk.TopKastConfig(0.75, 0.5, refresh_every=2, block_shape=(2, 2), sparse="*weight")
every_storage = pytest.mark.parametrize("storage", STORAGES)


def _weights() -> Tree:
    values = torch.randn(12, generator=torch.Generator().manual_seed(2)).double()
    return {"a.weight": values[:6].view(2, 3), "a.bias": values[6:8], "b.weight": values[8:]}


def _gradients(seed: int = 3) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator).double() for n, t in _weights().items()}


def _updates(optimizer: tk.Optimizer, gradients: list[Tree]) -> list[Tree]:
    theta, taken = _weights(), []
    state = optimizer.init(theta)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, theta)
        theta = {name: theta[name] + updates[name] for name in theta}
        taken.append(updates)
    return taken


# --- every optimiser in every kind of run ---------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "storage"),
    [
        *((name, CONFIG, "compact") for name in ("lion", "schedule", *TOGETHER)),
        ("gathered", BLOCKS, "compact"),
        ("all", CONFIG, "dense"),
    ],
)
def test_compiled_equals_eager_through_refreshes(name: str, config: Any, storage: Any) -> None:
    """One graph, traced once; outside B nothing moves, and on B∖A something does."""
    torch._dynamo.utils.clear_compilation_metrics()
    counter = CompileCounterWithBackend("aot_eager")
    optimizer, batches = EVERY[name], drawn(6)
    eager = run(config, optimizer, batches, storage)
    compiled = run(config, optimizer, batches, storage, {"backend": counter, "fullgraph": True})
    (metrics,) = torch._dynamo.utils.get_compilation_metrics()
    assert (counter.frame_count, metrics.restart_reasons) == (1, set())
    for one, other in zip(eager[1:], compiled[1:], strict=True):
        assert_close(tk.dense_params(one), tk.dense_params(other))
        assert_close(dense_slots(one), dense_slots(other))
        assert same(tk.masks_of(one), tk.masks_of(other))
    moved = torch.zeros((), dtype=torch.bool)
    for before, after in itertools.pairwise(compiled):
        for weight, masks in tk.masks_of(after).items():
            old, new = tk.dense_params(before)[weight], tk.dense_params(after)[weight]
            assert torch.equal(old[~masks.backward], new[~masks.backward])
            moved |= (old != new)[masks.backward & ~masks.forward].any()
            for tree in dense_slots(after).values():
                assert weight not in tree or not tree[weight][~masks.backward].any()
    assert moved
    assert not same(tk.masks_of(eager[0]), tk.masks_of(eager[-1]))


@pytest.mark.parametrize("name", EVERY)
def test_both_storages_move_alike(name: str) -> None:
    """The norm of all gradients is that over B in both."""
    compact, dense = (run(CONFIG, EVERY[name], drawn(6), storage) for storage in STORAGES)
    for one, other in zip(compact, dense, strict=True):
        assert_close(tk.dense_params(one), tk.dense_params(other))
        assert_close(dense_slots(one), dense_slots(other))
        assert same(tk.masks_of(one), tk.masks_of(other))
    assert not same(tk.dense_params(dense[0]), tk.dense_params(dense[-1]))


@every_storage
@pytest.mark.parametrize("name", EVERY)
def test_a_run_goes_on_from_a_file_bit_for_bit(name: str, storage: Any, tmp_path: Path) -> None:
    """Before a refresh is due, and between two batches of one update."""
    batches, optimizer = drawn(7), EVERY[name]
    whole = run(CONFIG, optimizer, batches, storage)
    for pause in (3, 4):
        tk.save(whole[pause], tmp_path / "state")
        loaded = tk.load(tmp_path / "state", CONFIG, network(), optimizer)
        assert list(loaded.optimizer.slots) == list(whole[pause].optimizer.slots)
        assert same(run(CONFIG, optimizer, batches[pause:], start=loaded)[-1], whole[-1])


# --- clip_by_global_norm and chain ----------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_gradients_above_the_norm_are_scaled_to_it(share: float) -> None:
    gradients = _gradients()
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    clip = tk.clip_by_global_norm(share * norm)
    clipped, state = clip.update(gradients, clip.init(gradients), _weights())
    assert_close(clipped, {name: share * gradient for name, gradient in gradients.items()})
    assert (int(state.step), state.slots) == (1, {})


def test_gradients_within_the_norm_stay_as_they_are_bit_for_bit() -> None:
    clip = tk.clip_by_global_norm(100.0)
    gradients = _gradients()
    assert same(clip.update(gradients, clip.init(gradients), _weights())[0], gradients)


def test_gradients_of_zero_stay_zero() -> None:
    clip = tk.clip_by_global_norm(1.0)
    zeros = {name: torch.zeros_like(gradient) for name, gradient in _gradients().items()}
    assert same(clip.update(zeros, clip.init(zeros), _weights())[0], zeros)


def test_the_norm_of_half_precision_is_that_of_float32() -> None:
    """It is above the largest number of float16, and the smallest one times it would be 0."""
    gradients = {"a": torch.full((4096,), 2048.0), "b": torch.full((2,), 2.0**-24)}
    half = {name: gradient.half() for name, gradient in gradients.items()}
    clip = tk.clip_by_global_norm(1.0)
    expected, _ = clip.update(gradients, clip.init(gradients), gradients)
    found, _ = clip.update(half, clip.init(half), half)
    assert expected["b"].all()
    assert same(found, expected)


def test_a_chain_clips_before_the_optimizer() -> None:
    clipped, lr = 0.5, 0.1
    gradients = [_gradients(seed) for seed in range(4)]
    optimizer = tk.chain(tk.clip_by_global_norm(clipped), tk.sgd(lr, momentum=0.9))
    reference = {name: tensor.clone().requires_grad_() for name, tensor in _weights().items()}
    sgd = torch.optim.SGD(list(reference.values()), lr=lr, momentum=0.9)
    for gradient, updates in zip(gradients, _updates(optimizer, gradients), strict=True):
        before = {name: tensor.detach().clone() for name, tensor in reference.items()}
        for name, tensor in reference.items():
            tensor.grad = gradient[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(list(reference.values()), clipped)
        assert norm > clipped
        sgd.step()
        moved = {name: reference[name].detach() - before[name] for name in before}
        assert_close(updates, moved, rtol=1e-5, atol=1e-8)  # torch divides by the norm + 1e-6


def test_a_part_after_the_optimizer_is_given_its_updates() -> None:
    gradients = _gradients()
    after = tk.chain(tk.adamw(1.0), tk.clip_by_global_norm(0.25))
    (updates,) = _updates(after, [gradients])
    (free,) = _updates(tk.adamw(1.0), [gradients])
    scale = 0.25 / math.sqrt(sum(float(update.square().sum()) for update in free.values()))
    assert scale < 1.0
    assert_close(updates, {name: scale * update for name, update in free.items()})


def test_a_chain_returns_updates_of_the_dtype_of_the_parameters() -> None:
    theta = {"w": torch.ones(3, dtype=torch.float16)}
    for parts in (
        (tk.clip_by_global_norm(1.0), tk.adam()),
        (tk.adam(), tk.clip_by_global_norm(1.0)),
    ):
        optimizer = tk.chain(*parts)
        updates, _ = optimizer.update(theta, optimizer.init(theta), theta)
        assert updates["w"].dtype == torch.float16


def test_a_chain_has_the_slots_and_the_rate_of_its_optimizer() -> None:
    optimizer = tk.chain(tk.clip_by_global_norm(1.0), tk.adamw(halving))
    assert same(optimizer.init(_weights()), tk.adamw().init(_weights()))
    rate: Any = optimizer.learning_rate(torch.tensor(1))
    assert float(rate) == 0.0625


def test_a_chain_within_a_chain() -> None:
    inner = tk.chain(tk.clip_by_global_norm(0.5), tk.adam())
    outer = tk.chain(tk.clip_by_global_norm(1.0), inner)
    gradients = [_gradients(seed) for seed in range(3)]
    assert_close(_updates(outer, gradients), _updates(inner, gradients))


def _noise() -> tk.Transformation:
    """A part of a user's own, with a slot."""

    def init(params: Params) -> tk.OptimizerState:
        zeros = {name: torch.zeros_like(theta) for name, theta in params.items()}
        return tk.OptimizerState(torch.zeros((), dtype=torch.int64), {"before": zeros})

    def update(
        updates: Tree, state: tk.OptimizerState, params: Tree
    ) -> tuple[Tree, tk.OptimizerState]:
        mixed = {n: 0.5 * (update + state.slots["before"][n]) for n, update in updates.items()}
        return mixed, tk.OptimizerState(state.step + 1, {"before": updates})

    return tk.Transformation(init, update, elementwise=True, name="noise()")


def test_a_part_of_ones_own_keeps_its_slots() -> None:
    gradients = [_gradients(seed) for seed in range(2)]
    updates = _updates(tk.chain(_noise(), tk.sgd(1.0)), gradients)
    expected = {n: -0.5 * (gradients[0][n] + gradients[1][n]) for n in gradients[0]}
    assert_close(updates[1], expected)
    states = run(CONFIG, tk.chain(_noise(), tk.sgd(0.1)), drawn(5))
    for name, masks in tk.masks_of(states[-1]).items():
        assert not dense_slots(states[-1])["before"][name][~masks.backward].any()


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((), ValueError, "chain needs exactly one optimiser, got 0 in ()"),
        ((tk.clip_by_global_norm(1.0),), ValueError, "got 0 in (clip_by_global_norm(1.0),)"),
        ((tk.sgd(0.1), tk.sgd(0.1)), ValueError, "got 2 in (sgd("),
        ((tk.clip_by_global_norm, tk.sgd(0.1)), TypeError, "call it, clip_by_global_norm(...)"),
        ((_noise(), _noise(), tk.sgd(0.1)), ValueError, "two parts of chain have slots ['before']"),
    ],
)
def test_parts_that_make_no_chain_are_refused(
    parts: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        tk.chain(*parts)


@pytest.mark.parametrize(
    ("norm", "error"),
    [
        (0.0, ValueError),
        (-1.0, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (True, TypeError),
        ("1", TypeError),
    ],
)
def test_a_norm_out_of_range_is_refused(norm: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=re.escape(f"in (0, inf), got {norm!r}")):
        tk.clip_by_global_norm(norm)


def test_a_part_alone_is_no_optimizer() -> None:
    clip: Any = tk.clip_by_global_norm(1.0)
    message = re.escape("clip_by_global_norm(1.0) is a part of an optimiser: chain(clip_by")
    with pytest.raises(TypeError, match=message):
        tk.init_state(network(), CONFIG, clip)


# --- multi_steps ------------------------------------------------------------------------------

QUARTERS = 4


def _joined(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """One batch of every four."""
    return [
        tuple(torch.cat(part) for part in zip(*batches[i : i + QUARTERS], strict=True))  # type: ignore[misc]
        for i in range(0, len(batches), QUARTERS)
    ]


@pytest.mark.parametrize("until", [None, 3])
@every_storage
@pytest.mark.parametrize("inner", [tk.adamw(0.01), tk.sgd(halving, momentum=0.9)])
def test_four_batches_make_the_update_of_one_as_large(
    inner: tk.Optimizer, storage: Any, until: int | None
) -> None:
    """Refreshes, the end of exploration and the schedule count updates."""
    config = tk.TopKastConfig(0.7, 0.4, refresh_every=2, explore_until=until)
    batches = drawn(20)
    whole = run(config, inner, _joined(batches), storage)
    parts = run(config, tk.multi_steps(inner, QUARTERS), batches, storage)
    assert not same(tk.masks_of(whole[0]), tk.masks_of(whole[-1]))
    for update, state in enumerate(whole):
        other = parts[QUARTERS * update]
        assert int(other.step) == int(state.step) == update
        assert_close(tk.dense_params(other), tk.dense_params(state))
        assert same(tk.masks_of(other), tk.masks_of(state))


@every_storage
def test_between_updates_nothing_moves_but_what_is_gathered(storage: Any) -> None:
    states = run(CONFIG, tk.multi_steps(tk.adamw(0.1), QUARTERS), drawn(12), storage)
    for call, (before, after) in enumerate(itertools.pairwise(states), 1):
        moved = call % QUARTERS == 0
        assert (int(after.step), int(after.optimizer.step)) == (call // QUARTERS, call)
        assert same(tk.dense_params(before), tk.dense_params(after)) != moved
        old, new = before.optimizer.slots, after.optimizer.slots
        assert torch.equal(old["adamw.exp_avg"]["0.bias"], new["adamw.exp_avg"]["0.bias"]) != moved
        gathered = new["multi_steps(4).gradient"]
        assert all(gradient.any() != moved for gradient in gathered.values())


@pytest.mark.parametrize("method", [tk.topkast(), tk.set(0.3), tk.rigl(0.3)])
@every_storage
def test_a_refresh_comes_before_the_first_batch_of_an_update(storage: Any, method: Any) -> None:
    """And before no other: another exchange of SET or RigL would change the sets again."""
    config = replace(CONFIG, method=method)
    states = run(config, tk.multi_steps(tk.sgd(0.5), QUARTERS), drawn(17), storage)
    changed = [
        call
        for call, (before, after) in enumerate(itertools.pairwise(states))
        if not same(tk.masks_of(before), tk.masks_of(after))
    ]
    assert changed == [8, 16]


@every_storage
def test_what_is_gathered_follows_its_weights_at_a_refresh_by_hand(storage: Any) -> None:
    states = run(CONFIG, tk.multi_steps(tk.sgd(0.5), 2), drawn(3), storage)
    before = states[-1]
    after = tk.refresh(before, CONFIG)
    old, new = (dense_slots(state)["multi_steps(2).gradient"] for state in (before, after))
    fresh = 0
    for name, masks in tk.masks_of(after).items():
        stays = tk.masks_of(before)[name].backward & masks.backward
        fresh += int((masks.backward & ~stays).sum())
        assert old[name][stays].any()
        assert torch.equal(new[name], torch.where(stays, old[name], 0.0))
    assert fresh > 0


def test_batches_of_one_update_draw_other_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    optimizer = tk.multi_steps(tk.sgd(0.1), 2)
    step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    state, losses = tk.init_state(model, CONFIG, optimizer), []
    for _ in range(2):
        state, metrics = step(state, drawn(1)[0])
        losses.append(float(metrics.data_loss))
    assert losses[0] != losses[1]


def test_accumulation_may_be_nested() -> None:
    gradients = [_gradients(seed) for seed in range(12)]
    nested = tk.multi_steps(tk.multi_steps(tk.adam(0.1), 2), 3)
    assert nested.every == 6
    assert_close(_updates(nested, gradients), _updates(tk.multi_steps(tk.adam(0.1), 6), gradients))


def test_one_call_for_an_update_is_the_optimizer_itself() -> None:
    gradients = [_gradients(seed) for seed in range(3)]
    assert same(_updates(tk.multi_steps(tk.adam(), 1), gradients), _updates(tk.adam(), gradients))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((tk.sgd(0.1), 0), ValueError, "every must be at least 1, got 0"),
        ((tk.sgd(0.1), 2.0), TypeError, "every must be an integer of at least 1, got 2.0"),
        ((tk.sgd, 2), TypeError, "got sgd: call it, sgd(...)"),
        ((tk.clip_by_global_norm(1.0), 2), TypeError, "is a part of an optimiser"),
        ((tk.multi_steps(tk.sgd(0.1), 2), 2), ValueError, "have slots ['multi_steps(2).gradient']"),
    ],
)
def test_what_cannot_accumulate_is_refused(
    arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        tk.multi_steps(*arguments)


# --- partition --------------------------------------------------------------------------------


def test_each_group_moves_as_its_optimizer_moves_it() -> None:
    """A parameter belongs to the first pattern that matches it."""
    owners = {"a.weight": tk.adamw(0.1), "a.bias": tk.sgd(halving), "b.weight": tk.lion(0.01)}
    optimizer = tk.partition({
        "*bias": owners["a.bias"],
        "a.*": owners["a.weight"],
        "*": owners["b.weight"],
    })
    gradients = [_gradients(seed) for seed in range(4)]
    found = _updates(optimizer, gradients)
    for name, owner in owners.items():
        alone = _updates(owner, gradients)
        assert all(one[name].any() for one in alone)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(found, alone, strict=True))


def test_groups_of_one_kind_have_the_slots_of_one_optimizer() -> None:
    """So a run may go over from one to the other."""
    decayed = tk.partition({"*bias": tk.adamw(weight_decay=0.0), "*": tk.adamw()})
    state, plain = decayed.init(_weights()), tk.adamw().init(_weights())
    assert {kind: {*tree} for kind, tree in state.slots.items()} == {
        kind: {*tree} for kind, tree in plain.slots.items()
    }


def test_nothing_may_be_left_for_all_others(tmp_path: Path) -> None:
    optimizer = tk.partition({"0.*": tk.sgd(0.1), "2.*": tk.sgd(0.1), "*": tk.adam()})
    whole = run(CONFIG, optimizer, drawn(4))
    assert whole[0].optimizer.slots == {"adam.exp_avg": {}, "adam.exp_avg_sq": {}}
    tk.save(whole[2], tmp_path / "state")
    loaded = tk.load(tmp_path / "state", CONFIG, network(), optimizer)
    assert same(run(CONFIG, optimizer, drawn(4)[2:], start=loaded)[-1], whole[-1])


def test_a_clip_is_of_its_group_or_of_all() -> None:
    clip, sgd, gradients = tk.clip_by_global_norm(0.5), tk.sgd(1.0), _gradients()
    (within,) = _updates(tk.partition({"*bias": tk.chain(clip, sgd), "*": sgd}), [gradients])
    (before,) = _updates(tk.chain(clip, tk.partition({"*bias": sgd, "*": sgd})), [gradients])
    assert_close(within["a.bias"].norm(), torch.tensor(0.5).double())
    assert torch.equal(within["a.weight"], -gradients["a.weight"])
    whole = torch.linalg.vector_norm(torch.cat([update.flatten() for update in before.values()]))
    assert_close(whole, torch.tensor(0.5).double())


def test_the_rates_of_groups_are_by_pattern() -> None:
    inner = tk.partition({"*bias": tk.sgd(0.5), "*": tk.sgd(halving)})
    optimizer = tk.chain(tk.clip_by_global_norm(1.0), tk.partition({"a*": inner, "*": tk.sgd(1)}))
    rates: Any = optimizer.learning_rate(torch.tensor(1))
    found = {"*": float(rates["*"]), **{k: float(rate) for k, rate in rates["a*"].items()}}
    assert rates.keys() == {"a*", "*"}
    assert found == {"*": 0.0625, "*bias": 0.5}


def test_one_rate_may_be_given_for_all_groups() -> None:
    optimizer, theta, gradients = TOGETHER["grouped"], _weights(), _gradients()
    updates, _ = optimizer.update(gradients, optimizer.init(theta), theta, torch.tensor(0.5))
    assert_close(updates["a.bias"], -0.5 * gradients["a.bias"])
    assert_close(updates["b.weight"], -0.5 * gradients["b.weight"].sign())


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ({}, ValueError, "partition needs at least one group, got an empty mapping"),
        ([tk.sgd(0.1)], TypeError, "partition takes optimisers by glob pattern, got [sgd("),
        ({1: tk.sgd(0.1)}, TypeError, "partition takes optimisers by glob pattern, got {1: sgd("),
        ({"*": tk.sgd}, TypeError, "got sgd: call it, sgd(...)"),
        ({"*": tk.clip_by_global_norm(1.0)}, TypeError, "is a part of an optimiser"),
        (
            {"a*": tk.multi_steps(tk.sgd(0.1), 2), "*": tk.sgd(0.1)},
            ValueError,
            "the groups of partition make an update every [1, 2] calls: accumulate over all",
        ),
    ],
)
def test_what_are_no_groups_is_refused(groups: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        tk.partition(groups)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["a.*"], "no pattern of partition matches ['b.weight']; there are: ['a.*']"),
        (["*", "b.*"], "patterns ['b.*'] of partition match no parameter that none before them"),
        (["typo", "*"], "patterns ['typo'] of partition match no parameter that none before"),
    ],
)
def test_patterns_that_do_not_fit_the_parameters_are_named(
    patterns: list[str], message: str
) -> None:
    optimizer = tk.partition({pattern: tk.sgd(0.1) for pattern in patterns})
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.init(_weights())


def test_a_group_of_nothing_clips_nothing() -> None:
    model, config = nn.Linear(6, 3), tk.TopKastConfig(0.5)
    clipped = tk.chain(tk.clip_by_global_norm(1.0), tk.sgd(0.1))
    groups = {"weight": tk.sgd(0.1), "bias": tk.sgd(0.1), "*": clipped}
    optimizer = tk.partition(groups)
    state = tk.init_state(model, config, optimizer)
    train_step = tk.make_train_step(
        model, lambda apply, x: apply(x).square().mean(), config, optimizer, compile=False
    )
    after, _ = train_step(state, torch.randn(4, 6))
    assert not torch.equal(after.weights.values["bias"], state.weights.values["bias"])
