"""The training step: the rules it keeps, purity, refreshes, bad input."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map

import topkast_func as tk
from tests import reference
from tests.storage import STORAGES, dense_slots

PAPER = tk.topkast("value", exchange=None)
CONFIG = tk.TopKastConfig(0.7, 0.4, refresh_every=3, method=PAPER)
AOT, EAGER = {"backend": "aot_eager"}, {"backend": "eager"}
OPTIMIZERS = {
    "sgd": lambda: tk.sgd(0.5),
    "momentum": lambda: tk.sgd(0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda: tk.adam(0.01, weight_decay=0.1),
    "adamw": lambda: tk.adamw(0.01),
}
every_storage = pytest.mark.parametrize("storage", STORAGES)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((16, 6), (16, 3))
    return [tuple(torch.randn(s, generator=generator) for s in shapes) for _ in range(n)]  # type: ignore[misc]


def mse(apply: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(apply(batch[0]), batch[1])


def run(
    model: nn.Module,
    config: tk.TopKastConfig,
    optimizer: tk.Optimizer,
    n: int,
    compile: Any,
    storage: Any = "compact",
) -> tuple[list[tk.TrainState], list[tk.StepMetrics]]:
    state = tk.init_state(model, config, optimizer, storage=storage)
    train_step = tk.make_train_step(model, mse, config, optimizer, compile=compile)
    states, metrics = [state], []
    for batch in batches(n):
        state, told = train_step(state, batch)
        states.append(state)
        metrics.append(told)
    return states, metrics


def leaves(tree: Any) -> list[Tensor]:
    found: list[Tensor] = tree_flatten(tree)[0]
    return found


def copied(tree: Any) -> Any:
    return tree_map(torch.clone, tree)


def same(one: Any, other: Any) -> bool:
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def same_masks(one: tk.TrainState, other: tk.TrainState) -> bool:
    return same(tk.masks_of(one), tk.masks_of(other))


# The update stays in B.


@pytest.mark.parametrize(
    ("name", "storage", "compile"),
    [
        *itertools.product(OPTIMIZERS, STORAGES, (False,)),
        *(("momentum", "compact", True), ("adam", "dense", True)),
    ],
)
def test_the_update_stays_in_b(name: str, storage: str, compile: bool) -> None:
    config, optimizer = replace(CONFIG, refresh_every=None), OPTIMIZERS[name]()
    states, _ = run(network(), config, optimizer, 4, compile, storage)
    for before, after in itertools.pairwise(states):
        for name, masks in tk.masks_of(before).items():
            old, new = tk.dense_params(before)[name], tk.dense_params(after)[name]
            assert torch.equal(old[~masks.backward], new[~masks.backward])
            moved = (old != new)[masks.backward & ~masks.forward]
            assert moved.any()
        for tree in dense_slots(after).values():
            for name, masks in tk.masks_of(after).items():
                assert not tree[name][~masks.backward].any()
                assert tree[name][masks.backward].any()


def test_negative_zero_outside_b_keeps_its_sign() -> None:
    params = {"weight": torch.tensor([[3.0, 2.0, -0.0, -0.0]])}
    config = tk.TopKastConfig(0.75, 0.5, penalty=None)
    optimizer = tk.sgd(0.1)
    step = tk.make_train_step(lambda p, x: x @ p["weight"].T, mse, config, optimizer, compile=False)
    state, _ = step(tk.init_state(params, config, optimizer), (torch.ones(1, 4), torch.ones(1, 1)))
    assert tk.dense_params(state)["weight"].signbit().tolist() == [[False, False, True, True]]


def test_one_step_equals_the_oracle() -> None:
    theta = torch.randn(4, 5, dtype=torch.float64)
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    config = tk.TopKastConfig(0.7, 0.4, penalty=None)
    optimizer = tk.sgd(0.1)
    step = tk.make_train_step(lambda p, x: x @ p["weight"].T, mse, config, optimizer, compile=False)
    state = tk.init_state({"weight": theta}, config, optimizer)
    after, _ = step(state, (x, y))
    forward, backward = (m.numpy() for m in tk.masks_of(state)["weight"])
    values = theta.numpy()
    error = x.numpy() @ (values * forward).T - y.numpy()
    gradient = 2 * error.T @ x.numpy() / error.size
    expected = reference.step_at_alpha(values, forward, backward, gradient, 0.1)
    np.testing.assert_allclose(tk.dense_params(after)["weight"].numpy(), expected, rtol=1e-12)


# At a refresh a slot follows its weight; an entry that newly enters B starts at zero.


@pytest.mark.parametrize(("value", "storage"), [(0.0, "compact"), (0.25, "dense")])
def test_a_layer_of_one_value_learns_in_all_its_rows(value: float, storage: Any) -> None:
    model = nn.Linear(16, 10)
    nn.init.constant_(model.weight, value)
    config, optimizer = tk.TopKastConfig(0.9, 0.8, refresh_every=20), tk.sgd(0.1)
    state = tk.init_state(model, config, optimizer, storage=storage)
    train_step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    x, target = torch.randn(32, 16), torch.randn(10, 16)
    for _ in range(200):
        state, _ = train_step(state, (x, x @ target.T))
    moved = tk.dense_params(state)["weight"] != value
    assert moved.any(1).all()


@every_storage
@pytest.mark.parametrize("make", [OPTIMIZERS["momentum"], OPTIMIZERS["adam"]])
def test_slots_follow_their_weights_and_newcomers_start_at_zero(
    make: Callable[[], tk.Optimizer], storage: str
) -> None:
    config = replace(CONFIG, refresh_every=None)
    state = run(network(), config, make(), 6, compile=False, storage=storage)[0][-1]
    after = tk.refresh(state, config)
    came = left = stayed = 0
    for kind, tree in dense_slots(after).items():
        for name, masks in tk.masks_of(after).items():
            old, new = tk.masks_of(state)[name].backward, masks.backward
            slot, before = tree[name], dense_slots(state)[kind][name]
            assert torch.equal(slot[old & new], before[old & new])
            assert not slot[new & ~old].any()
            assert not slot[~new].any()
            came += int((new & ~old).sum())
            left += int((old & ~new).sum())
            stayed += int(before[old & new].count_nonzero())
    assert min(came, left, stayed) > 0


# Refresh: before step t when t > 0 and t % N == 0; at explore_until B becomes A.


@every_storage
def test_refresh_comes_before_each_nth_step_and_not_before_step_zero(storage: str) -> None:
    states, _ = run(network(), CONFIG, tk.sgd(0.5), 8, compile=False, storage=storage)
    changed = [not same_masks(a, b) for a, b in itertools.pairwise(states)]
    assert changed == [False, False, False, True, False, False, True, False]
    for t in (3, 6):
        chosen = tk.compute_masks(tk.dense_params(states[t]), CONFIG)
        assert same(chosen, tk.masks_of(states[t + 1]))


@every_storage
def test_b_becomes_a_once_and_selection_stops(storage: str) -> None:
    config = replace(CONFIG, explore_until=4)
    states, _ = run(
        network(), config, tk.sgd(0.5, momentum=0.9), 10, compile=False, storage=storage
    )
    kept = tk.masks_of(states[4])
    for state in states[5:]:
        for name, masks in tk.masks_of(state).items():
            assert torch.equal(masks.forward, kept[name].forward)
            assert torch.equal(masks.backward, kept[name].forward)
    assert not torch.equal(kept["0.weight"].backward, kept["0.weight"].forward)
    theta = [tk.dense_params(states[t])["0.weight"] for t in (5, 10)]
    assert torch.equal(theta[0][~kept["0.weight"].forward], theta[1][~kept["0.weight"].forward])


def test_nothing_is_chosen_after_the_end_of_exploration() -> None:
    config, optimizer, model = replace(CONFIG, explore_until=4), tk.sgd(0.5), network()
    step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    state, history = tk.init_state(model, config, optimizer), tk.History()
    tk.train(step, state, batches(10), config, [history])
    assert [refresh.step for refresh in history.refreshes] == [3, 4]


@every_storage
def test_sets_are_not_chosen_anew_by_a_configuration_that_forgets_some(storage: Any) -> None:
    state = tk.init_state(network(), CONFIG, tk.sgd(0.1), storage=storage)
    forgetful = replace(CONFIG, forward_sparsity={"0.weight": 0.75})
    with pytest.raises(ValueError, match=r"sparse parameters missing \[\], unknown \['2.weight'\]"):
        tk.refresh(state, forgetful)


@every_storage
def test_exploration_can_end_before_it_begins(storage: str) -> None:
    states, _ = run(
        network(), replace(CONFIG, explore_until=0), tk.sgd(0.5), 2, compile=False, storage=storage
    )
    for masks in tk.masks_of(states[1]).values():
        assert torch.equal(masks.forward, masks.backward)


@every_storage
def test_a_loop_of_ones_own_refreshes_by_hand(storage: str) -> None:
    config = replace(CONFIG, refresh_every=None)
    states, _ = run(network(), config, tk.sgd(0.5), 6, compile=False, storage=storage)
    assert same_masks(states[0], states[-1])
    before = copied(states[-1])
    after = tk.refresh(states[-1], config)
    assert same(before, states[-1])
    assert not same_masks(after, states[-1])
    assert same(tk.dense_params(after), tk.dense_params(states[-1]))


@every_storage
def test_masks_are_a_function_of_theta_alone(storage: str) -> None:
    state = run(network(), CONFIG, tk.adam(0.05), 4, compile=False, storage=storage)[0][-1]
    once = tk.refresh(state, CONFIG)
    assert same(tk.masks_of(once), tk.compute_masks(tk.dense_params(state), CONFIG))
    assert same(once, tk.refresh(once, CONFIG))


# Pure: no function writes to its arguments, and the module is never mutated.


@pytest.mark.parametrize("compile", [False, True])
def test_a_step_writes_to_nothing(compile: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    held = copied(model.state_dict())
    optimizer = tk.sgd(0.05, momentum=0.9)
    state = tk.init_state(model, CONFIG, optimizer)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=compile)
    for batch in batches(5):
        before = copied((state, batch))
        generator = torch.get_rng_state()
        after, _ = train_step(state, batch)
        assert same(before, (state, batch))
        assert torch.equal(generator, torch.get_rng_state())
        state = after
    assert same(held, dict(model.state_dict()))
    assert all(p.grad is None for p in model.parameters())


def test_a_state_shares_no_memory_with_the_model() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    state = tk.init_state(model, CONFIG, tk.sgd(0.1))
    before = copied(state)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    assert same(before, state)


def test_buffers_live_in_the_state_and_reach_inference() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    twin = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    states, _ = run(model, CONFIG, tk.sgd(0.05), 3, compile=False)
    assert states[-1].buffers["1.num_batches_tracked"] == 3
    assert not torch.equal(
        states[-1].buffers["1.running_mean"], states[0].buffers["1.running_mean"]
    )
    twin.load_state_dict(tk.forward_params(states[-1]), strict=False)
    model.eval(), twin.eval()
    x = torch.randn(4, 6)
    expected = functional_call(model, tk.forward_params(states[-1]), (x,))
    assert torch.equal(twin(x), expected)
    masks = tk.masks_of(states[-1])["0.weight"]
    assert not twin.get_parameter("0.weight")[~masks.forward].any()


class Average(nn.Module):
    """A buffer that is assigned anew, and one that is written in place."""

    mean: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
        self.calls += 1
        return y


@pytest.mark.parametrize("compile", [False, AOT])
def test_buffers_that_a_module_assigns_live_in_the_state(compile: Any) -> None:
    model = Average()
    states, _ = run(model, CONFIG, tk.sgd(0.05), 3, compile)
    assert states[-1].buffers["calls"] == 3
    assert states[-1].buffers["mean"].any()
    assert not states[-1].buffers["mean"].requires_grad
    assert not torch.equal(states[-1].buffers["mean"], states[1].buffers["mean"])
    assert not model.mean.any()
    assert model.calls == 0


def test_frozen_parameters_stay_and_are_used() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 3))
    model.get_submodule("0").requires_grad_(False)
    given = model.get_parameter("0.weight")
    states, _ = run(model, CONFIG, tk.sgd(0.1), 3, compile=False)
    assert list(tk.dense_params(states[-1])) == ["1.weight", "1.bias"]
    assert torch.equal(states[-1].frozen["0.weight"], given)
    assert torch.equal(tk.forward_params(states[-1])["0.weight"], given)


# Compiled equals eager; one graph; nothing recompiles at a refresh.


@pytest.mark.parametrize(
    ("name", "penalty", "backend"),
    [
        ("sgd", "l1", "aot_eager"),
        ("momentum", None, "aot_eager"),
        ("adam", "group_l2", "aot_eager"),
        ("adamw", "l2", "inductor"),
    ],
)
def test_compiled_equals_eager(name: str, penalty: Any, backend: str) -> None:
    model = network().double()
    config = replace(CONFIG, penalty=penalty, penalty_weight=0.1, refresh_every=2)
    data = tree_map(torch.Tensor.double, batches(4))
    ends = []
    for compile in (False, {"backend": backend}):
        optimizer = OPTIMIZERS[name]()
        state = tk.init_state(model, config, optimizer)
        start = tk.dense_params(state)
        train_step = tk.make_train_step(model, mse, config, optimizer, compile=compile)
        for batch in data:
            state, metrics = train_step(state, batch)
        ends.append((state, metrics))
    (eager, eager_metrics), (compiled, compiled_metrics) = ends
    assert same_masks(eager, compiled)
    assert not same(tk.masks_of(eager), tk.compute_masks(start, config))
    for name in start:
        expected = tk.dense_params(eager)[name] - start[name]
        found = tk.dense_params(compiled)[name] - start[name]
        torch.testing.assert_close(found, expected)
    for name, masks in tk.masks_of(eager).items():
        moved = tk.dense_params(eager)[name] != start[name]
        assert moved[masks.backward & ~masks.forward].any()
    torch.testing.assert_close(compiled_metrics, eager_metrics)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * torch.rand(x.shape)


def test_random_numbers_are_the_same_compiled_and_eager_and_differ_between_steps() -> None:
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), Noise(), nn.Linear(64, 3))
    config, optimizer = replace(CONFIG, refresh_every=None), tk.sgd(0.0)
    told: dict[bool, list[float]] = {}
    for compile in (False, True):
        state = tk.init_state(model, config, optimizer, seed=7)
        train_step = tk.make_train_step(model, mse, config, optimizer, compile=compile)
        told[compile] = []
        for _ in range(3):
            state, metrics = train_step(state, batches(1)[0])
            told[compile].append(float(metrics.data_loss))
    np.testing.assert_allclose(told[True], told[False], rtol=1e-5)
    assert len(set(told[False])) == 3


@pytest.mark.parametrize("compile", [False, AOT])
def test_deterministic_bit_for_bit(compile: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    one, other = (run(model, CONFIG, tk.adam(0.01), 5, compile)[0][-1] for _ in range(2))
    assert same(one, other)


def test_the_seed_of_the_state_decides_what_dropout_draws() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    optimizer = tk.sgd(0.1)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    told = {
        float(train_step(tk.init_state(model, CONFIG, optimizer, seed=s), batches(1)[0])[1].loss)
        for s in (0, 1)
    }
    assert len(told) == 2


def test_one_graph_through_refreshes_and_learning_rates() -> None:
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    config = replace(CONFIG, refresh_every=2, explore_until=7)
    optimizer = tk.adam(lambda step: 0.1 / (1 + step))
    model = network()
    state = tk.init_state(model, config, optimizer)
    train_step = tk.make_train_step(
        model, mse, config, optimizer, compile={"backend": counting, "fullgraph": True}
    )
    for batch in batches(10):
        state, _ = train_step(state, batch)
    assert len(graphs) == 1
    assert int(state.step) == 10


def test_each_shape_of_batch_compiles_once() -> None:
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile={"backend": counting})
    for n in (16, 16, 5, 16):
        state, _ = train_step(state, (torch.randn(n, 6), torch.randn(n, 3)))
    assert len(graphs) == 2


def test_dropout_and_a_ragged_last_batch() -> None:
    model, optimizer = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=AOT)
    for n in (16, 16, 5, 16):
        state, _ = train_step(state, (torch.randn(n, 6), torch.randn(n, 3)))
    assert int(state.step) == 4


@torch._dynamo.config.patch(recompile_limit=2)  # type: ignore[untyped-decorator]
def test_too_many_shapes_name_the_way_on() -> None:
    model, optimizer = nn.Linear(6, 3), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=EAGER)

    def epoch(state: tk.TrainState) -> None:
        for n in range(2, 8):
            state, _ = train_step(state, (torch.randn(n, 6), torch.randn(n, 3)))

    with pytest.raises(RuntimeError, match=r"more shapes of batches .* drop_last, raise that"):
        epoch(state)


@torch._dynamo.config.patch(recompile_limit=2)  # type: ignore[untyped-decorator]
def test_many_steps_in_one_process_do_not_share_a_recompile_limit() -> None:
    for scale in range(3):
        config, optimizer = replace(CONFIG, penalty_weight=float(scale)), tk.sgd(0.1)
        step = tk.make_train_step(
            lambda p, x: x @ p["weight"].T, mse, config, optimizer, compile={"backend": "eager"}
        )
        params = {"weight": torch.randn(3, 6)}
        step(tk.init_state(params, config, optimizer), batches(1)[0])


# Metrics, schedules, autocast, models of any kind.


def test_metrics_are_scalars_that_add_up() -> None:
    config = replace(CONFIG, penalty_weight=0.25)
    states, metrics = run(network(), config, tk.sgd(0.1), 1, compile=False)
    told = metrics[0]
    assert all(value.shape == () for value in told[:-1])
    assert told.penalty > 0
    torch.testing.assert_close(told.loss, told.data_loss + 0.25 * told.penalty)
    params, masks = tk.dense_params(states[0]), tk.masks_of(states[0])
    expected = tk.penalized_loss(network(), mse, params, masks, batches(1)[0], config)
    torch.testing.assert_close(told.loss, expected)


@pytest.mark.parametrize("compile", [False, AOT])
def test_a_learning_rate_tensor_is_read_at_each_step(compile: Any) -> None:
    lr = torch.tensor(0.1)
    model, optimizer = network(), tk.sgd(lr)
    state = tk.init_state(model, CONFIG, optimizer)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=compile)
    moved, _ = train_step(state, batches(1)[0])
    assert not same(tk.dense_params(moved), tk.dense_params(state))
    lr.zero_()
    rested, _ = train_step(state, batches(1)[0])
    assert same(tk.dense_params(rested), tk.dense_params(state))


def test_autocast_inside_the_loss() -> None:
    def loss(apply: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = apply(batch[0])
        return nn.functional.mse_loss(y.float(), batch[1])

    model, optimizer = network(), tk.sgd(0.1)
    updates = []
    for compile in (False, AOT):
        state = tk.init_state(model, CONFIG, optimizer)
        train_step = tk.make_train_step(model, loss, CONFIG, optimizer, compile=compile)
        after, _ = train_step(state, batches(1)[0])
        masks = tk.masks_of(state)["2.weight"]
        update = (tk.dense_params(after)["2.weight"] - tk.dense_params(state)["2.weight"]).double()
        assert update[masks.backward & ~masks.forward].any()
        updates.append(update)
    assert (updates[0] - updates[1]).abs().max() < 0.02 * updates[0].abs().max()  # bfloat16


def test_bfloat16_parameters_train() -> None:
    model, optimizer = network().bfloat16(), tk.adam(0.01)
    state = tk.init_state(model, CONFIG, optimizer)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    for x, y in batches(4):
        state, metrics = train_step(state, (x.bfloat16(), y.bfloat16()))
    assert tk.dense_params(state)["0.weight"].dtype == torch.bfloat16
    assert torch.isfinite(metrics.loss)


@every_storage
def test_a_pure_function_trains_like_its_module(storage: Any) -> None:
    model = nn.Linear(6, 3).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    optimizer = tk.adam(0.01)
    ends = []
    for what, init in ((model, model), (lambda p, x: functional_call(model, p, (x,)), params)):
        state = tk.init_state(init, CONFIG, optimizer, storage=storage)
        train_step = tk.make_train_step(what, mse, CONFIG, optimizer, compile=False)
        for batch in tree_map(torch.Tensor.double, batches(4)):
            state, _ = train_step(state, batch)
        ends.append({n: t - params[n] for n, t in tk.dense_params(state).items()})
    assert all(update.any() for update in ends[0].values())
    torch.testing.assert_close(*ends)  # the kernels sum in another order


def test_at_sparsity_zero_the_step_is_that_of_torch() -> None:
    model, twin = network().double(), network().double()
    twin.load_state_dict(model.state_dict())
    config = tk.TopKastConfig(0.0, 0.0, penalty=None)
    optimizer, torch_optimizer = tk.adam(0.01), torch.optim.Adam(twin.parameters(), 0.01)
    state = tk.init_state(model, config, optimizer)
    train_step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    for x, y in tree_map(torch.Tensor.double, batches(20)):
        state, _ = train_step(state, (x, y))
        torch_optimizer.zero_grad()
        nn.functional.mse_loss(twin(x), y).backward()  # type: ignore[no-untyped-call]
        torch_optimizer.step()
    for name, p in twin.named_parameters():
        start = model.get_parameter(name)
        torch.testing.assert_close(tk.dense_params(state)[name] - start, p.detach() - start)


def test_training_lowers_the_loss() -> None:
    config, optimizer = replace(CONFIG, refresh_every=5), tk.adam(0.02)
    model, batch = network(), batches(1)[0]
    state = tk.init_state(model, config, optimizer)
    train_step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    told = []
    for _ in range(150):
        state, metrics = train_step(state, batch)
        told.append(float(metrics.data_loss))
    assert told[-1] < 0.6 * told[0]


# Bad input gets a clear error, and nothing is lost.


@pytest.mark.parametrize("compile", [False, EAGER])
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda apply, b: apply(b[0]), TypeError, r"0-d tensor, got shape \(16, 3\)"),
        (lambda apply, b: 1.0, TypeError, "0-d tensor, got float"),
        (lambda apply, b: apply(b[1]).sum(), ValueError, r"inputs of shape \(16, 3\) do not fit"),
        (lambda apply, b: b["no such key"], TypeError, "tuple indices"),
    ],
)
def test_a_fault_of_the_callers_raises_by_its_own_name(
    compile: Any, loss: Any, error: type[Exception], message: str
) -> None:
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    before = copied(state)
    train_step = tk.make_train_step(model, loss, CONFIG, optimizer, compile=compile)
    with pytest.raises(error, match=message):
        train_step(state, batches(1)[0])
    assert same(before, state)


def test_a_bad_batch_after_good_ones_raises_and_training_goes_on() -> None:
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=EAGER)
    state, _ = train_step(state, batches(1)[0])
    with pytest.raises(ValueError, match=r"\(16, 5\) do not fit a layer of in_features=6"):
        train_step(state, (torch.randn(16, 5), torch.randn(16, 3)))
    state, _ = train_step(state, batches(1)[0])
    assert int(state.step) == 2


@pytest.mark.parametrize("compile", [False, EAGER])
def test_a_nan_loss_is_told_and_the_masks_stay(compile: Any) -> None:
    def loss(apply: Any, batch: Any) -> Tensor:
        return mse(apply, batch) * float("nan")

    config = replace(CONFIG, refresh_every=1)
    model, optimizer = network(), tk.sgd(0.1)
    start = state = tk.init_state(model, config, optimizer)
    train_step = tk.make_train_step(model, loss, config, optimizer, compile=compile)
    state, metrics = train_step(state, batches(1)[0])
    assert metrics.loss.isnan()
    with pytest.warns(UserWarning, match=r"no refresh before step 1: params\['0.weight'\] .*NaN"):
        state, metrics = train_step(state, batches(1)[0])
    assert metrics.loss.isnan()
    assert same_masks(start, state)
    with pytest.raises(ValueError, match=r"params\['0.weight'\] holds NaN.* summary counts those"):
        tk.refresh(state, config)


@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
def test_nan_parameters_are_named_at_the_start(name: str) -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = float("nan")
    with pytest.raises(ValueError, match=rf"params\['{name}'\] holds NaN"):
        tk.init_state(model, CONFIG, tk.sgd(0.1))


def test_a_state_of_another_model_is_refused() -> None:
    optimizer = tk.sgd(0.1)
    state = tk.init_state(nn.Linear(6, 3), CONFIG, optimizer)
    train_step = tk.make_train_step(network(), mse, CONFIG, optimizer)
    with pytest.raises(ValueError, match=r"missing \['0.bias', .*\], unknown \['bias', 'weight'\]"):
        train_step(state, batches(1)[0])


def test_a_state_of_other_widths_is_refused() -> None:
    optimizer = tk.sgd(0.1)
    state = tk.init_state(nn.Linear(6, 4), CONFIG, optimizer)
    train_step = tk.make_train_step(nn.Linear(6, 3), mse, CONFIG, optimizer)
    with pytest.raises(ValueError, match=r"'weight' has shape \(4, 6\), the model \(3, 6\)"):
        train_step(state, batches(1)[0])


def test_a_state_without_the_buffers_of_the_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    params = {name: p.detach() for name, p in model.named_parameters()}
    optimizer = tk.sgd(0.1)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer)
    with pytest.raises(ValueError, match=r"buffers missing \['1.num_batches_tracked'"):
        train_step(tk.init_state(params, CONFIG, optimizer), batches(1)[0])


@pytest.mark.parametrize(("one", "other"), [(tk.sgd(0.1), tk.adam()), (tk.adam(), tk.sgd(0.1))])
def test_a_state_of_another_optimizer_is_refused(one: tk.Optimizer, other: tk.Optimizer) -> None:
    model = network()
    train_step = tk.make_train_step(model, mse, CONFIG, other)
    with pytest.raises(ValueError, match="the state is of another optimiser"):
        train_step(tk.init_state(model, CONFIG, one), batches(1)[0])


def test_an_engine_that_there_is_not_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match=r"engine must be 'auto' or one of .*, got 'cuda'"):
        tk.make_train_step(network(), mse, CONFIG, tk.sgd(0.1), engine="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("compile", [None, "reduce-overhead"])
def test_compile_is_a_bool_or_options(compile: Any) -> None:
    with pytest.raises(TypeError, match=r"compile must be a bool or options of torch.compile"):
        tk.make_train_step(network(), mse, CONFIG, tk.sgd(0.1), compile=compile)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"storage": "sparse"}, ValueError, "storage must be 'compact' or 'dense', got 'sparse'"),
        ({"storage": "dense", "theta_device": "cpu"}, ValueError, "theta_device is for compact"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_arguments_of_init_state(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tk.init_state(network(), CONFIG, tk.sgd(0.1), **fields)


def test_no_warning_in_an_ordinary_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.script_method`", DeprecationWarning)
        run(network(), CONFIG, tk.adam(0.1), 4, compile=True)


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (torch.optim.SGD([torch.zeros(1)], lr=0.1), "SGD, which moves the parameters of a module"),
        (torch.optim.AdamW, "AdamW, which moves the parameters of a module, .*, after tk.sparsify"),
        (tk.sgd, r"sgd: call it, sgd\(...\)"),
        (SimpleNamespace(init=max, update=max), "SimpleNamespace, a pair as torchopt"),
        (None, "NoneType$"),
    ],
)
def test_an_optimizer_that_is_none_of_the_library_is_named(optimizer: Any, kind: str) -> None:
    message = (
        rf"optimizer must be what sgd\(\), adam\(\), adamw\(\) or lion\(\) returns, got {kind}"
    )
    with pytest.raises(TypeError, match=message):
        tk.init_state(nn.Linear(4, 4), CONFIG, optimizer)
    with pytest.raises(TypeError, match=message):
        tk.make_train_step(nn.Linear(4, 4), lambda apply, x: apply(x).sum(), CONFIG, optimizer)


def test_what_cannot_be_called_is_named() -> None:
    with pytest.raises(TypeError, match="model must be callable, got int"):
        tk.make_train_step(3, lambda apply, x: apply(x), CONFIG, tk.sgd(0.1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss_fn must be callable, got str"):
        tk.make_train_step(nn.Linear(4, 4), "mse", CONFIG, tk.sgd(0.1))  # type: ignore[arg-type]


def test_the_compiled_step_has_the_products_of_the_kernels_in_its_graph() -> None:
    products: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        products.extend(
            n.name for n in graph.graph.nodes if "topkast_func.forward" in str(n.target)
        )
        return graph

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    state = tk.init_state(model, CONFIG, tk.sgd(0.1))
    loss_fn = lambda apply, x: apply(x).square().mean()  # noqa: E731
    step = tk.make_train_step(model, loss_fn, CONFIG, tk.sgd(0.1), compile={"backend": backend})
    for _ in range(2):
        state, _ = step(state, torch.randn(4, 8))
    assert len(products) == 2


def test_weights_by_name_that_are_one_tensor_are_named() -> None:
    weight = torch.randn(3, 6)
    params = {"encoder.weight": weight, "decoder.weight": weight}
    with pytest.raises(ValueError, match=r"'encoder.weight' and 'decoder.weight' are one tensor"):
        tk.init_state(params, tk.TopKastConfig(), tk.sgd(0.1))
    apart = {name: tensor.clone() for name, tensor in params.items()}
    assert int(tk.init_state(apart, tk.TopKastConfig(), tk.sgd(0.1)).step) == 0
