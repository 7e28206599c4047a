"""How each method chooses A and B, at the start and at a refresh."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import topkast_func as tk
from tests import reference
from topkast_func.testing import check_counts, check_largest, check_nested, check_outside_untouched

BASE = tk.TopKastConfig(0.75, 0.5, refresh_every=2, penalty_weight=0.01)
METHODS = {
    "topkast": tk.topkast(),
    "random_backward": tk.random_backward(),
    "ste": tk.ste(),
    "static": tk.static(),
    "set": tk.set(0.4),
    "rigl": tk.rigl(0.4),
    "gmp": tk.gmp(2, 6, stages=2),
    "dense": tk.dense(),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
QUARTER: Any = Fraction(1, 4)
FIXED = ("static", "set", "rigl")
COMPILED = ("topkast", "ste", "rigl", "gmp", "dense")
"""Those whose steps differ, and not their sets alone."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def mse(apply: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(apply(batch[0]), batch[1])


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 8, generator=generator), torch.randn(16, 4, generator=generator)


def states(
    config: tk.TopKastConfig, steps: int = 7, compile: Any = False, storage: Any = "compact"
) -> list[tk.TrainState]:
    model, optimizer = network(), tk.sgd(0.1, momentum=0.9)
    found = [tk.init_state(model, config, optimizer, storage=storage)]
    train_step = tk.make_train_step(model, mse, config, optimizer, compile=compile)
    for seed in range(steps):
        found.append(train_step(found[-1], batch(seed))[0])
    return found


def theta(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


# Rules that every method keeps.


@every_method
@pytest.mark.parametrize("storage", ["compact", "dense"])
def test_counts_are_exact_and_nothing_outside_b_moves(method: tk.Method, storage: str) -> None:
    config = replace(BASE, method=method)
    path = states(config, 7, storage=storage)
    for t, (before, after) in enumerate(pairwise(path)):
        params, masks = tk.dense_params(after), tk.masks_of(after)
        check_nested(masks, params)
        check_counts(masks, params, config, step=t + 1)
        if t % 2 or t == 0:
            check_outside_untouched(before, after)


@every_method
def test_storages_agree(method: tk.Method) -> None:
    config = replace(BASE, method=method)
    compact, dense = (states(config, 7, storage=s)[-1] for s in ("compact", "dense"))
    torch.testing.assert_close(tk.forward_params(compact), tk.forward_params(dense))
    torch.testing.assert_close(tk.dense_params(compact), tk.dense_params(dense))


@pytest.mark.parametrize(
    ("name", "storage", "compile"),
    [
        *((name, "compact", {"backend": "aot_eager"}) for name in COMPILED if name != "topkast"),
        ("topkast", "dense", {"backend": "aot_eager"}),
        ("topkast", "compact", True),
    ],
)
def test_compiled_equals_eager(name: str, storage: str, compile: Any) -> None:
    config = replace(BASE, method=METHODS[name])
    eager, compiled = (states(config, 7, each, storage)[-1] for each in (False, compile))
    torch.testing.assert_close(tk.dense_params(compiled), tk.dense_params(eager))
    for name, masks in tk.masks_of(eager).items():
        assert torch.equal(masks.forward, tk.masks_of(compiled)[name].forward)


@every_method
def test_a_resumed_run_equals_the_uninterrupted_one(method: tk.Method, tmp_path: Any) -> None:
    config = replace(BASE, method=method)
    path = states(config, 7)
    tk.save(path[3], tmp_path / "state", config)
    state = tk.load(tmp_path / "state")
    step = tk.make_train_step(network(), mse, config, tk.sgd(0.1, momentum=0.9), compile=False)
    for seed in range(3, 7):
        state, _ = step(state, batch(seed))
    torch.testing.assert_close(tk.dense_params(state), tk.dense_params(path[-1]), rtol=0, atol=0)


@pytest.mark.parametrize("name", [*FIXED, "ste", "gmp", "dense"])
def test_methods_that_do_not_explore_have_no_penalty(name: str) -> None:
    config = replace(BASE, method=METHODS[name])
    model, optimizer = network(), tk.sgd(0.1)
    step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    _, metrics = step(tk.init_state(model, config, optimizer), batch(0))
    assert float(metrics.penalty) == 0.0
    params = dict(model.named_parameters())
    masks = tk.compute_masks(params, config)
    assert float(tk.exploration_penalty(params, masks, config)) == 0.0


@every_method
def test_methods_are_values(method: tk.Method) -> None:
    config = replace(BASE, method=method)
    assert config == replace(BASE, method=replace(method))
    assert hash(config) == hash(replace(BASE, method=replace(method)))


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (tk.topkast(exchange=np.float32(0.25)), tk.topkast(exchange=0.25)),
        (tk.random_backward(exchange=QUARTER), tk.random_backward(exchange=0.25)),
        (tk.set(np.float16(0.5)), tk.set(0.5)),
        (tk.rigl(1), tk.rigl(1.0)),
        (tk.gmp(np.int64(2), np.int32(6), np.uint8(2)), tk.gmp(2, 6, stages=2)),
    ],
)
def test_the_numbers_of_a_method_become_those_of_python(
    given: tk.Method, plain: tk.Method, tmp_path: Any
) -> None:
    assert (given, hash(given), repr(given)) == (plain, hash(plain), repr(plain))
    config = replace(BASE, method=given)
    assert config.to_json() == replace(BASE, method=plain).to_json()
    state = tk.init_state(network(), config, tk.sgd(0.1))
    tk.save(state, tmp_path / "state", config)
    tk.save_sharded(state, tmp_path / "folder", config)


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("rigl", r": call it, tk\.rigl\(drop_fraction=0\.3\)$"),
        (tk.rigl, r": call it, tk\.rigl\(drop_fraction=0\.3\)$"),
        (tk.gmp, r": call it, tk\.gmp\(begin, end, stages=7\)$"),
        ("adam", "got 'adam'$"),
        (None, "got None$"),
        ([], r"got \[\]$"),
    ],
)
def test_what_is_no_method_is_refused(method: Any, way: str) -> None:
    told = r"method must be a method such as topkast\(\) or rigl\(\), got "
    with pytest.raises(TypeError, match=f"{told}.*{way.removeprefix('got ')}"):
        tk.TopKastConfig(method=method)


# What each of them does.


def test_random_backward_keeps_a_and_draws_the_rest_anew() -> None:
    config = replace(BASE, method=tk.random_backward())
    params = theta(weight=(20, 30))
    drawn = [tk.compute_masks(params, config, seed=s)["weight"] for s in (0, 0, 1)]
    top = tk.compute_masks(params, BASE)["weight"]
    assert all(torch.equal(masks.forward, top.forward) for masks in drawn)
    assert torch.equal(drawn[0].backward, drawn[1].backward)
    assert not torch.equal(drawn[0].backward, drawn[2].backward)
    assert not torch.equal(drawn[0].backward, top.backward)
    state = tk.init_state(params, config, tk.sgd(0.1))
    later = tk.refresh(state._replace(step=state.step + 2), config)
    first, second = (tk.masks_of(s)["weight"] for s in (state, later))
    assert torch.equal(first.forward, second.forward)
    assert not torch.equal(first.backward, second.backward)


def test_ste_trains_everything_and_computes_with_the_largest() -> None:
    config = replace(BASE, method=tk.ste(), refresh_every=1)
    state = states(config, 3)[-1]
    for masks in tk.masks_of(state).values():
        assert masks.backward.all()
    fresh = tk.refresh(state, config)
    check_largest(tk.masks_of(fresh), tk.dense_params(fresh), config)


def test_static_never_changes_and_ignores_magnitude() -> None:
    path = states(replace(BASE, method=tk.static()), 7)
    first, last = tk.masks_of(path[0]), tk.masks_of(path[-1])
    for name, masks in first.items():
        assert torch.equal(masks.forward, last[name].forward)
    params = theta(weight=(30, 40))
    drawn = [
        tk.compute_masks(p, replace(BASE, method=tk.static()))["weight"]
        for p in (params, {"weight": -2 * params["weight"].flip(0)})
    ]
    assert torch.equal(drawn[0].forward, drawn[1].forward)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5))
def test_random_sets_are_drawn_evenly_over_the_tensor(rows: int, columns: int, seed: int) -> None:
    config = replace(BASE, method=tk.static())
    params = {"weight": torch.zeros(rows, columns), "b.weight": torch.zeros(rows, columns)}
    masks = tk.compute_masks(params, config, seed=seed)
    check_counts(masks, params, config)
    if rows * columns > 60:
        assert not torch.equal(masks["weight"].forward, masks["b.weight"].forward)
        assert masks["weight"].forward.flatten()[: rows * columns // 2].any()


def expected_survivors(values: Any, active: Any, fraction: float) -> Any:
    """Keep of A the largest, ties in the order of their keys, in plain loops."""
    places = [i for i in range(values.size) if active.flat[i]]
    gone = min(int(fraction * len(places)), values.size - len(places))
    ranked = reference.ranked(values, places)
    stay = np.zeros(values.shape, bool)
    stay.flat[ranked[: len(places) - gone]] = True
    return stay


@pytest.mark.parametrize("step", [0, 3, 6])
def test_set_drops_the_smallest_and_draws_as_many_along_a_cosine(step: int) -> None:
    config = replace(BASE, method=tk.set(0.5), explore_until=8)
    params = theta(weight=(20, 30))
    state = tk.init_state(params, config, tk.sgd(0.1))
    state = state._replace(step=torch.tensor(step))
    old, new = (tk.masks_of(s)["weight"].forward for s in (state, tk.refresh(state, config)))
    fraction = 0.25 * (1 + math.cos(math.pi * step / 8))
    stay = expected_survivors(params["weight"].numpy(), old.numpy(), fraction)
    assert (new.numpy() & stay == stay).all()
    assert int(new.sum()) == int(old.sum())
    grown = new & ~torch.from_numpy(stay)
    assert int(grown.sum()) == int(fraction * int(old.sum()))


def test_the_dense_gradient_leaves_the_running_means_of_the_state_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 4))
    state = tk.init_state(model, BASE, tk.sgd(0.1))
    before = {name: buffer.clone() for name, buffer in state.buffers.items()}
    tk.dense_gradients(model, mse, state, batch(0))
    torch.testing.assert_close(dict(state.buffers), before, rtol=0, atol=0)


def test_rigl_grows_where_the_dense_gradient_is_largest_and_from_zero() -> None:
    config = replace(BASE, method=tk.rigl(0.5), refresh_every=None)
    model = network()
    state = tk.init_state(model, config, tk.sgd(0.1))
    gradients = tk.dense_gradients(model, mse, state, batch(0))
    after = tk.refresh(state, config, gradients)
    alpha = tk.forward_params(state)
    for name, masks in tk.masks_of(state).items():
        inputs = {k: v.clone().requires_grad_(k == name) for k, v in alpha.items()}
        loss = mse(lambda x, p=inputs: torch.func.functional_call(model, p, (x,)), batch(0))
        (dense,) = torch.autograd.grad(loss, inputs[name])
        torch.testing.assert_close(gradients[name], dense)
        values = tk.dense_params(state)[name].numpy()
        stay = expected_survivors(values, masks.forward.numpy(), 0.5)
        candidates = np.where(stay, 0.0, np.abs(dense.numpy()) + 1e-12)
        count = int(masks.forward.sum()) - int(stay.sum())
        ranking = reference.ranked(candidates, range(stay.size))[:count]
        expected = stay.copy()
        expected.flat[ranking] = True
        new = tk.masks_of(after)[name]
        np.testing.assert_array_equal(new.forward.numpy(), expected)
        entered = new.forward & ~masks.forward
        assert entered.any()
        assert not tk.dense_params(after)[name][entered].any()
        kept = new.forward & masks.forward
        old, now = tk.dense_params(state)[name], tk.dense_params(after)[name]
        assert torch.equal(old[kept], now[kept])


def test_rigl_by_hand_needs_gradients() -> None:
    config = replace(BASE, method=tk.rigl())
    state = tk.init_state(network(), config, tk.sgd(0.1))
    with pytest.raises(ValueError, match=r"RigL.* pass refresh\(\.\.\., gradients="):
        tk.refresh(state, config)


def test_a_gradient_that_is_nan_keeps_the_sets_and_warns() -> None:
    config = replace(BASE, method=tk.rigl())
    state = tk.init_state(network(), config, tk.sgd(0.1))._replace(step=torch.tensor(2))
    step = tk.make_train_step(network(), mse, config, tk.sgd(0.1), compile=False)
    bad = (torch.full((4, 8), torch.nan), torch.zeros(4, 4))
    with pytest.warns(
        UserWarning, match=r"no refresh before step 2: the gradient of .* is not finite"
    ):
        after, _ = step(state, bad)
    for name, masks in tk.masks_of(state).items():
        assert torch.equal(masks.forward, tk.masks_of(after)[name].forward)


@pytest.mark.parametrize("make", [tk.set, tk.rigl])
@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_drop_fraction_out_of_range_is_refused(make: Any, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"drop_fraction must be in \[0, 1\]"):
        make(fraction)


def test_gmp_goes_from_dense_to_sparse_in_stages_by_magnitude() -> None:
    config = replace(BASE, method=tk.gmp(2, 6, stages=2))
    assert config.schedule.starts == (4, 6)
    path = states(config, 8)
    sparsity = {0: 0.0, 2: 0.0, 4: 0.75 * (1 - 0.5**3), 6: 0.75}
    for t, after in enumerate(path[1:]):
        stage = max(start for start in sparsity if start <= t + 1)
        params = tk.dense_params(after)
        for name, masks in tk.masks_of(after).items():
            assert torch.equal(masks.forward, masks.backward)
            count = reference.count(sparsity[stage], params[name].numel())
            assert int(masks.forward.sum()) == count
            if t + 1 == stage:
                expected = reference.top_mask(params[name].double().numpy(), sparsity[stage])
                np.testing.assert_array_equal(masks.forward.numpy(), expected)


def test_dense_is_plain_training() -> None:
    model, config = network(), replace(BASE, method=tk.dense())
    state = tk.init_state(model, config, tk.sgd(0.1, momentum=0.9))
    assert tk.masks_of(state) == {}
    step = tk.make_train_step(model, mse, config, tk.sgd(0.1, momentum=0.9), compile=False)
    for seed in range(5):
        state, _ = step(state, batch(seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for seed in range(5):
        optimizer.zero_grad()
        mse(model, batch(seed)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.testing.assert_close(tk.dense_params(state), dict(model.named_parameters()))


# Schedules.


@pytest.mark.parametrize(
    ("storage", "compile"),
    [("compact", False), ("dense", False), ("compact", {"backend": "eager"})],
)
def test_staged_sparsities_change_the_counts_and_keep_the_weights(
    storage: str, compile: Any
) -> None:
    forward, backward = tk.staged({0: 0.5, 3: 0.9}), tk.staged({0: 0.25, 5: 0.8})
    config = tk.TopKastConfig(forward, backward, refresh_every=None)
    path = states(config, 7, compile, storage)
    for t, after in enumerate(path[1:]):
        params = tk.dense_params(after)
        check_counts(tk.masks_of(after), params, config, step=t + 1)
        if t + 1 not in {3, 5}:
            check_outside_untouched(path[t], after)


@every_method
@pytest.mark.parametrize("allocation", ["uniform", "erk"])
@pytest.mark.parametrize("sparsities", [{0: 0.5, 2: 0.9}, {0: 0.9, 3: 0.5, 4: 0.55}])
def test_every_method_follows_the_stages(
    sparsities: dict[int, float], allocation: Any, method: tk.Method
) -> None:
    config = tk.TopKastConfig(
        tk.staged(sparsities), 0.4, refresh_every=2, method=method, allocation=allocation
    )
    for t, after in enumerate(states(config, 6)[1:]):
        check_counts(tk.masks_of(after), tk.dense_params(after), config, step=t + 1)


@pytest.mark.parametrize("stages", [1, 2, 7, 30])
@pytest.mark.parametrize("kind", ["gmp", "cubic", "staged"])
@pytest.mark.parametrize("storage", ["compact", "dense"])
def test_the_sparsity_that_was_asked_for_is_in_force_after_the_last_step_of_its_schedule(
    kind: str, stages: int, storage: Any
) -> None:
    schedule: dict[str, dict[str, Any]] = {
        "gmp": {"forward_sparsity": 0.75, "method": tk.gmp(1, 6, stages)},
        "cubic": {"forward_sparsity": tk.cubic(0.25, 0.75, 1, 6, stages)},
        "staged": {"forward_sparsity": tk.staged({0: 0.25, 6: 0.75})},
    }
    config = replace(tk.TopKastConfig(refresh_every=4), **schedule[kind])
    reached = [
        sum(int(masks.forward.sum()) for masks in tk.masks_of(state).values())
        for state in states(config, 6, storage=storage)
    ]
    assert reached[6] == (8 * 12 + 12 * 4) // 4 < reached[1]


def test_a_stage_that_begins_is_a_refresh_of_the_step_before() -> None:
    config = replace(BASE, forward_sparsity=tk.staged({0: 0.6, 3: 0.7, 4: 0.75}), refresh_every=4)
    model, optimizer = network(), tk.multi_steps(tk.sgd(0.1), 2)
    state = tk.init_state(model, config, optimizer)
    train_step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    told, changed = [], []
    for seed in range(20):
        before = tk.masks_of(state)["0.weight"].forward
        state, metrics = train_step(state, batch(seed))
        told.append(bool(metrics.refreshed))
        changed.append(not torch.equal(before, tk.masks_of(state)["0.weight"].forward))
    assert [t for t in range(20) if told[t]] == [5, 7, 16]
    assert all(told[t] for t in range(20) if changed[t])
    assert changed[5]
    assert changed[7]


@pytest.mark.parametrize("storage", ["compact", "dense"])
def test_a_stage_that_a_state_has_not_come_to_is_chosen_first(storage: Any) -> None:
    early = replace(BASE, forward_sparsity=0.6, refresh_every=None)
    config = replace(early, forward_sparsity=tk.staged({0: 0.6, 3: 0.75}))
    state = states(early, 3, storage=storage)[-1]
    train_step = tk.make_train_step(
        network(), mse, config, tk.sgd(0.1, momentum=0.9), compile=False
    )
    after, metrics = train_step(state, batch(3))
    assert metrics.refreshed
    check_counts(tk.masks_of(after), tk.dense_params(after), config, step=3)


@every_method
def test_a_run_resumed_where_a_stage_begins_equals_the_uninterrupted_one(
    method: tk.Method, tmp_path: Any
) -> None:
    forward, backward = tk.staged({0: 0.6, 2: 0.75}), tk.staged({0: 0.3, 3: 0.5})
    config = replace(BASE, forward_sparsity=forward, backward_sparsity=backward, method=method)
    path = states(config, 6)
    for t in (2, 3):
        tk.save(path[t], tmp_path / "state", config)
        state = tk.load(tmp_path / "state")
        step = tk.make_train_step(network(), mse, config, tk.sgd(0.1, momentum=0.9), compile=False)
        for seed in range(t, 6):
            state, _ = step(state, batch(seed))
        expected = tk.dense_params(path[-1])
        torch.testing.assert_close(tk.dense_params(state), expected, rtol=0, atol=0)


def test_static_sets_shrink_and_grow_by_as_little_as_they_can() -> None:
    config = tk.TopKastConfig(tk.staged({0: 0.5, 2: 0.9, 4: 0.6}), method=tk.static())
    path = [tk.masks_of(state)["0.weight"].forward for state in states(config, 6)]
    first, small, large = path[1], path[3], path[5]
    assert (small <= first).all()
    assert (small <= large).all()


def test_densities_by_pattern_go_through_the_method() -> None:
    params = theta(a=(8, 8), b=(8, 8))
    base = replace(BASE, sparse="*", allocation={"a": 0.5})
    pruned = replace(base, method=tk.gmp(0, 10))
    assert tk.allocate(params, pruned, step=0)["a"].forward == 0.0
    assert tk.allocate(params, pruned, step=10)["a"] == (0.5, 0.5)
    for name, sparsity in tk.allocate(params, replace(base, method=tk.ste())).items():
        assert sparsity == ({"a": 0.5, "b": 0.75}[name], 0.0)


@every_method
def test_weights_that_are_not_contiguous_have_the_same_sets(method: tk.Method) -> None:
    config, params = replace(BASE, method=method, sparse="*"), theta(a=(6, 8), b=(4, 6, 3, 3))
    strided = {
        "a": params["a"].t().contiguous().t(),
        "b": params["b"].contiguous(memory_format=torch.channels_last),
    }
    expected = tk.compute_masks(params, config)
    for name, masks in tk.compute_masks(strided, config).items():
        assert torch.equal(masks.forward, expected[name].forward)
        assert torch.equal(masks.backward, expected[name].backward)


def test_no_more_of_a_goes_than_there_are_entries_to_come() -> None:
    """The smallest of nine goes; the next smallest stays, whatever the gradients are."""
    scores = torch.arange(1.0, 11.0).view(1, 10)
    gradient = torch.tensor([[5.0, 1.0, *[0.0] * 7, 9.0]])
    active, drawn = scores < 10, torch.Generator()
    given = tk.methods.Situation("weight", scores, 9, 9, active, gradient, 0.0, drawn, held=9)
    forward, _ = tk.rigl(0.3).sets(given)
    assert torch.equal(forward, scores > 1)


@pytest.mark.parametrize("method", [tk.topkast(), tk.rigl()])
@torch._dynamo.config.patch(recompile_limit=2)  # type: ignore[untyped-decorator]
def test_more_stages_than_dynamo_keeps_graphs_for(method: tk.Method) -> None:
    stages = tk.staged({t: 0.5 + 0.1 * t for t in range(3)})
    config = tk.TopKastConfig(stages, 0.25, refresh_every=None, method=method)
    assert int(states(config, 3, {"backend": "eager"})[-1].step) == 3


def test_erk_counts_hold_through_training() -> None:
    config = replace(BASE, allocation="erk", keep_dense="2.weight", forward_sparsity=0.8)
    state = states(config, 5)[-1]
    assert list(tk.masks_of(state)) == ["0.weight"]
    check_counts(tk.masks_of(state), tk.dense_params(state), config)
