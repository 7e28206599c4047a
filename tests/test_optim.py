"""Optimisers against torch.optim, their learning rates, purity and errors."""

import math
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import topkast_func as tk
from tests.optimizers import EVERY
from tests.storage import STORAGES

Tree: TypeAlias = dict[str, Tensor]
Reference: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer]

STEPS = 50
TENTH = torch.tensor(0.1, dtype=torch.float64)
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALVES)

SGD = [
    {"momentum": 0.0},
    {"momentum": 0.0, "weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.5, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]
ADAM: list[dict[str, Any]] = [
    {"betas": betas, "eps": eps, "weight_decay": decay}
    for betas, eps in (((0.9, 0.999), 1e-8), ((0.5, 0.9), 1e-2), ((0.0, 0.9), 1e-2))
    for decay in (0.0, 0.1)
]
PAIRS = [
    *((tk.sgd, torch.optim.SGD, options) for options in SGD),
    *((tk.adam, torch.optim.Adam, options) for options in ADAM),
    *((tk.adamw, torch.optim.AdamW, options) for options in ADAM),
]
OPTIMIZERS = {
    "sgd": tk.sgd(lr=0.1),
    "momentum": tk.sgd(lr=0.1, momentum=0.9),
    "adam": tk.adam(lr=0.1),
    "adamw": tk.adamw(lr=0.1),
    "lion": tk.lion(lr=0.1),
}
KINDS = {
    "sgd": set[str](),
    "momentum": {"sgd.momentum"},
    "adam": {"adam.exp_avg", "adam.exp_avg_sq"},
    "adamw": {"adamw.exp_avg", "adamw.exp_avg_sq"},
    "lion": {"lion.exp_avg"},
}


def _weights() -> Tree:
    values = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {"weight": values[:12].view(4, 3), "bias": values[12:]}


def _gradients(theta: Tree) -> Tree:
    """Gradient of a mean squared error with a tanh; no entry of it is zero."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    target = torch.randn(16, 4, generator=generator, dtype=torch.float64)

    def loss(theta: Tree) -> Tensor:
        return (torch.tanh(x @ theta["weight"].T + theta["bias"]) - target).square().mean()

    gradients: Tree = torch.func.grad(loss)(theta)
    assert all(gradient.abs().min() > 0.0 for gradient in gradients.values())
    return gradients


def _updates(optimizer: tk.Optimizer, steps: int) -> list[Tree]:
    theta = _weights()
    state = optimizer.init(theta)
    taken = []
    for _ in range(steps):
        updates, state = optimizer.update(_gradients(theta), state, theta)
        theta = {name: theta[name] + updates[name] for name in theta}
        taken.append(updates)
    return taken


def _updates_of_torch(reference: Reference, steps: int) -> list[Tree]:
    theta = _weights()
    optimizer = reference(list(theta.values()))
    taken = []
    for _ in range(steps):
        before = {name: leaf.clone() for name, leaf in theta.items()}
        for name, gradient in _gradients(before).items():
            theta[name].grad = gradient
        optimizer.step()
        taken.append({name: theta[name] - before[name] for name in theta})
    return taken


def _assert_equal(found: list[Tree], expected: list[Tree]) -> None:
    """Compare updates relative to their own size, after asserting that they have one."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(float(update.abs().max()) for update in theirs.values())
        assert scale > 0.0
        assert_close(
            {name: update / scale for name, update in ours.items()},
            {name: update / scale for name, update in theirs.items()},
        )


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_fifty_updates_equal_those_of_torch_optim(
    ours: Callable[..., tk.Optimizer], theirs: Callable[..., Any], options: dict[str, Any]
) -> None:
    expected = _updates_of_torch(lambda theta: theirs(theta, lr=0.05, **options), STEPS)
    _assert_equal(_updates(ours(lr=0.05, **options), STEPS), expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(tk.adam, torch.optim.Adam), (tk.adamw, torch.optim.AdamW)],
)
def test_the_defaults_are_those_of_torch_optim(
    ours: Callable[..., tk.Optimizer], theirs: Callable[..., Any]
) -> None:
    _assert_equal(_updates(ours(), 5), _updates_of_torch(theirs, 5))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_trained_state_moves_as_torch_optim_moves_a_dense_model(
    optimizer: tk.Optimizer, storage: Any
) -> None:
    """At sparsity 0 a training step is the optimiser's step."""
    config = tk.TopKastConfig(forward_sparsity=0.0, backward_sparsity=0.0, penalty=None)
    model = torch.nn.Linear(3, 4, dtype=torch.float64)
    x, target = torch.randn(16, 3).double(), torch.randn(16, 4).double()
    loss = lambda apply, batch: (apply(batch[0]) - batch[1]).square().mean()  # noqa: E731
    step = tk.make_train_step(model, loss, config, optimizer, compile=False)
    state = tk.init_state(model, config, optimizer, storage=storage)
    theta = tk.dense_params(state)
    slots = optimizer.init(theta)
    for _ in range(4):
        gradients = torch.func.grad(
            lambda t: (torch.func.functional_call(model, t, x) - target).square().mean()
        )(theta)
        updates, slots = optimizer.update(gradients, slots, theta)
        theta = {name: theta[name] + updates[name] for name in theta}
        before = tk.dense_params(state)
        state, _ = step(state, (x, target))
        moved = {name: tk.dense_params(state)[name] - before[name] for name in before}
        assert all(update.abs().max() > 0.01 for update in moved.values())
        assert_close(moved, updates)


def test_a_layer_that_a_batch_does_not_use_is_moved_by_its_moments_and_decay() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    config = tk.TopKastConfig(0.5, 0.2, penalty=None)
    used = lambda apply, batch: apply(batch).square().mean()  # noqa: E731

    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = model

        def forward(self, x: Tensor) -> Tensor:
            return self.branches["a"](x)

    net, optimizer = Branches(), tk.adamw(0.1, weight_decay=0.5)
    state = tk.init_state(net, config, optimizer)
    step = tk.make_train_step(net, used, config, optimizer, compile=False)
    before = tk.dense_params(state)["branches.b.weight"]
    after = tk.dense_params(step(state, torch.ones(4, 3))[0])["branches.b.weight"]
    backward = tk.masks_of(state)["branches.b.weight"].backward
    assert_close(after, torch.where(backward, before * (1 - 0.1 * 0.5), before))


@pytest.mark.parametrize(
    "lr", [0.1, TENTH, lambda step: 0.1, lambda step: TENTH], ids=["float", "0-d", "f", "f to 0-d"]
)
@pytest.mark.parametrize("make", [tk.sgd, tk.adam, tk.adamw, tk.lion])
def test_every_form_of_a_constant_learning_rate_gives_the_same_updates(
    make: Callable[..., tk.Optimizer], lr: Any
) -> None:
    _assert_equal(_updates(make(lr), 3), _updates(make(lr=0.1), 3))


@pytest.mark.parametrize("make", [tk.sgd, tk.adam, tk.adamw, tk.lion])
def test_a_learning_rate_tensor_is_read_anew_at_each_step(
    make: Callable[..., tk.Optimizer],
) -> None:
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer, theta = make(lr), _weights()
    state, gradients = optimizer.init(theta), _gradients(_weights())
    before, _ = optimizer.update(gradients, state, theta)
    lr.fill_(0.3)
    after, _ = optimizer.update(gradients, state, theta)
    assert all(update.abs().min() > 0.0 for update in before.values())
    assert_close(after, {name: 3.0 * update for name, update in before.items()})


def test_a_schedule_is_called_with_the_number_of_the_step_from_0() -> None:
    steps: list[Tensor] = []

    def schedule(step: Tensor) -> float:
        steps.append(step)
        return 0.1

    _updates(tk.sgd(schedule), 4)
    assert [int(step) for step in steps] == [0, 1, 2, 3]
    assert all(step.shape == () for step in steps)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda step: 0.5 * (1.0 + math.cos(math.pi * step / STEPS)),
    "piecewise": lambda step: 0.1 if step < 10 else 0.01,
    "of tensors": lambda step: 0.1 / torch.sqrt(step + 1.0),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_sets_the_learning_rate_of_each_step(schedule: Callable[[Any], Any]) -> None:
    optimizer, theta = tk.sgd(schedule), _weights()
    state, gradients = optimizer.init(theta), _gradients(theta)
    rates = []
    for t in range(15):
        updates, state = optimizer.update(gradients, state, theta)
        rates.append(float(schedule(torch.tensor(t))))
        assert_close(updates, {name: -rates[t] * gradients[name] for name in theta})
    assert len(set(rates)) > 1


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_drives_the_training_step(schedule: Callable[[Any], Any]) -> None:
    config = tk.TopKastConfig(forward_sparsity=0.0, backward_sparsity=0.0, penalty=None)
    optimizer = tk.sgd(schedule)
    theta = {"weight": torch.ones(1, 2, dtype=torch.float64)}
    step = tk.make_train_step(
        lambda params, x: params["weight"] * x,
        lambda apply, x: apply(x).sum(),
        config,
        optimizer,
        compile=False,
    )
    state = tk.init_state(theta, config, optimizer)
    for t in range(12):
        before = tk.dense_params(state)["weight"]
        state, _ = step(state, torch.ones(1, 2))
        moved = tk.dense_params(state)["weight"] - before
        expected = -float(schedule(torch.tensor(t)))
        assert_close(moved, torch.full((1, 2), expected, dtype=torch.float64))


@pytest.mark.parametrize(("beta", "most"), [(0.999, 6.6), (0.95, 1.1)])
def test_an_entry_that_begins_late_moves_by_more_than_the_learning_rate(
    beta: float, most: float
) -> None:
    """By how much is in the README."""
    optimizer, theta = tk.adam(1.0, (0.9, beta)), {"w": torch.zeros(1, dtype=torch.float64)}
    state = optimizer.init(theta)._replace(step=torch.tensor(10**6))
    moves = []
    for _ in range(200):
        updates, state = optimizer.update({"w": torch.ones_like(theta["w"])}, state, theta)
        moves.append(-float(updates["w"]))
    assert round(max(moves), 1) == most


def test_the_learning_rate_of_a_call_replaces_the_schedule() -> None:
    optimizer, theta = tk.sgd(lr=0.1), _weights()
    gradients = _gradients(theta)
    updates, _ = optimizer.update(gradients, optimizer.init(theta), theta, torch.tensor(0.5))
    assert_close(updates, {name: -0.5 * gradients[name] for name in theta})


@pytest.mark.parametrize("lr", [0.25, torch.tensor(0.25), lambda step: 0.25, lambda step: step / 4])
def test_learning_rate_is_a_0d_tensor(lr: Any) -> None:
    rate: Any = tk.sgd(lr).learning_rate(torch.tensor(1))
    assert rate.shape == ()
    assert float(rate) == 0.25


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_update_writes_to_none_of_its_arguments(optimizer: tk.Optimizer) -> None:
    theta = _weights()
    gradients = _gradients(theta)
    _, state = optimizer.update(gradients, optimizer.init(theta), theta)
    trees = (gradients, theta, *state.slots.values())
    before = [{name: leaf.clone() for name, leaf in tree.items()} for tree in trees]
    updates, after = optimizer.update(gradients, state, theta)
    for tree, copies in zip(trees, before, strict=True):
        assert all(torch.equal(tree[name], copies[name]) for name in copies)
    assert (int(state.step), int(after.step)) == (1, 2)
    assert all(update.abs().min() > 0.0 for update in updates.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_same_arguments_give_the_same_update_bit_for_bit(optimizer: tk.Optimizer) -> None:
    first, second = _updates(optimizer, 3), _updates(optimizer, 3)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_init_makes_zero_slots_like_the_parameters(name: str) -> None:
    theta = {
        "half": torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True),
        "double": torch.ones(4, dtype=torch.float64),
    }
    state = OPTIMIZERS[name].init(theta)
    assert int(state.step) == 0
    assert state.slots.keys() == KINDS[name]
    for tree in state.slots.values():
        assert list(tree) == list(theta)
        for leaf, slot in tree.items():
            assert slot.dtype == {"half": torch.float32, "double": torch.float64}[leaf]
            assert not slot.requires_grad
            assert torch.equal(slot, torch.zeros_like(slot))
            assert slot.shape == theta[leaf].shape


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_updates_and_slots_keep_dtype_and_shape(
    optimizer: tk.Optimizer, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    theta = {"leaf": torch.ones(shape, dtype=dtype)}
    gradients = {"leaf": torch.ones(shape, dtype=dtype)}
    updates, state = optimizer.update(gradients, optimizer.init(theta), theta)
    assert (updates["leaf"].dtype, updates["leaf"].shape) == (dtype, shape)
    for tree in state.slots.values():
        assert tree["leaf"].shape == shape
        assert tree["leaf"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert updates["leaf"].abs().min() > 0.0


@pytest.mark.parametrize("make", [tk.sgd, tk.adam, tk.adamw, tk.lion])
@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [
        (-0.1, ValueError, "lr must be in [0.0, inf), got -0.1"),
        (math.nan, ValueError, "lr must be in [0.0, inf), got nan"),
        (math.inf, ValueError, "lr must be in [0.0, inf), got inf"),
        (torch.ones(1), ValueError, "lr must be a 0-d tensor, got shape (1,)"),
        (True, TypeError, "lr must be a number in [0.0, inf), got True"),
        ("0.1", TypeError, "lr must be a number in [0.0, inf), got '0.1'"),
        (None, TypeError, "lr must be a number in [0.0, inf), got None"),
    ],
)
def test_a_bad_learning_rate_is_refused(
    make: Callable[..., tk.Optimizer], lr: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make(lr=lr)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentum": 1.0}, ValueError, "momentum must be in [0.0, 1.0), got 1.0"),
        ({"momentum": -0.1}, ValueError, "momentum must be in [0.0, 1.0), got -0.1"),
        ({"momentum": math.nan}, ValueError, "momentum must be in [0.0, 1.0), got nan"),
        ({"momentum": True}, TypeError, "momentum must be a number in [0.0, 1.0), got True"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be in [0.0, inf), got -1.0"),
        ({"weight_decay": "0"}, TypeError, "weight_decay must be a number in [0.0, inf), got '0'"),
        ({"nesterov": True}, ValueError, "nesterov needs momentum above 0"),
    ],
)
def test_bad_options_of_sgd_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        tk.sgd(lr=0.1, **options)


@pytest.mark.parametrize("make", [tk.adam, tk.adamw])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"betas": (1.0, 0.9)}, ValueError, "betas[0] must be in [0.0, 1.0), got 1.0"),
        ({"betas": (0.9, -0.1)}, ValueError, "betas[1] must be in [0.0, 1.0), got -0.1"),
        ({"betas": (0.9, math.nan)}, ValueError, "betas[1] must be in [0.0, 1.0), got nan"),
        ({"betas": (0.9, "x")}, TypeError, "betas[1] must be a number in [0.0, 1.0), got 'x'"),
        ({"eps": -1e-8}, ValueError, "eps must be in [0.0, inf), got -1e-08"),
        ({"eps": True}, TypeError, "eps must be a number in [0.0, inf), got True"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay must be in [0.0, inf), got nan"),
        ({"weight_decay": False}, TypeError, "weight_decay must be a number in [0.0, inf), got F"),
    ],
)
def test_bad_options_of_adam_and_adamw_are_refused(
    make: Callable[..., tk.Optimizer],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make(**options)


@pytest.mark.parametrize("make", [tk.adam, tk.adamw])
@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999)])
def test_betas_that_are_no_pair_are_refused_by_name(
    make: Callable[..., tk.Optimizer], betas: Any
) -> None:
    with pytest.raises((TypeError, ValueError), match="betas"):
        make(betas=betas)


def test_lion_is_what_its_paper_prints() -> None:
    """Chen et al. (2023), algorithm 2, in NumPy, on gradients whose signs change."""
    beta1, beta2, eta, decay = 0.9, 0.99, 0.01, 0.1
    generator = np.random.default_rng(0)
    theta, momentum = generator.normal(size=5), np.zeros(5)
    ours = {"w": torch.from_numpy(theta.copy())}
    optimizer = tk.lion(eta, (beta1, beta2), decay)
    state, signs = optimizer.init(ours), []
    for _ in range(30):
        gradient = generator.normal(size=5)
        interpolated = beta1 * momentum + (1.0 - beta1) * gradient
        theta = theta - eta * (np.sign(interpolated) + decay * theta)
        momentum = beta2 * momentum + (1.0 - beta2) * gradient
        signs.append(np.sign(interpolated))
        updates, state = optimizer.update({"w": torch.from_numpy(gradient)}, state, ours)
        ours = {"w": ours["w"] + updates["w"]}
        assert_close(ours["w"], torch.from_numpy(theta))
        assert_close(state.slots["lion.exp_avg"]["w"], torch.from_numpy(momentum))
    assert np.ptp(signs, axis=0).all()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: tk.sgd(0.05, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
        (lambda: tk.adam(0.05), lambda p: torch.optim.Adam(p, lr=0.05)),
        (lambda: tk.adamw(0.05), lambda p: torch.optim.AdamW(p, lr=0.05)),
    ],
)
def test_a_complex_parameter_moves_as_torch_optim_moves_it(
    ours: Callable[[], tk.Optimizer], theirs: Reference
) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw() -> Tensor:
        return torch.randn(3, 2, generator=generator, dtype=torch.complex128)

    theta, optimizer = {"w": draw()}, ours()
    reference = theta["w"].clone()
    state, other = optimizer.init(theta), theirs([reference])
    for _ in range(20):
        reference.grad = draw()
        updates, state = optimizer.update({"w": reference.grad}, state, theta)
        assert updates["w"].imag.abs().min() > 0.0
        theta = {"w": theta["w"] + updates["w"]}
        other.step()
        assert_close(theta["w"], reference)


@pytest.mark.parametrize("optimizer", EVERY.values(), ids=EVERY)
def test_an_ensemble_moves_under_vmap_as_each_of_its_members(optimizer: tk.Optimizer) -> None:
    generator = torch.Generator().manual_seed(5)
    draw = partial(torch.randn, 3, 4, generator=generator, dtype=torch.float64)
    names = ("0.weight", "bias", "w")
    theta, batches = {n: draw() for n in names}, [{n: draw() for n in names} for _ in range(3)]

    def member(tree: Any, i: int) -> Any:
        return tree_map(lambda leaf: leaf[i], tree)

    starts = [optimizer.init(member(theta, i)) for i in range(3)]
    state = tree_map(lambda *leaves: torch.stack(leaves), *starts)
    for t, grads in enumerate(batches):
        rate = optimizer.learning_rate(torch.tensor(t))
        update = partial(optimizer.update, lr=rate)
        updates, state = torch.func.vmap(update)(grads, state, theta)
        for i in range(3):
            alone, starts[i] = update(member(grads, i), starts[i], member(theta, i))
            assert_close(member(updates, i), alone)
            assert_close(member(state, i), starts[i])


# --- half precision ----------------------------------------------------------------------

HALF_STEPS = 100
FOLLOWED = 8
"""Roundings of the loss by which a run in half precision may be off: θ is rounded at each step."""


def _tokens() -> nn.Module:
    """The row of a token that never comes, and a unit that is never active, have no gradient."""
    torch.manual_seed(0)
    hidden = nn.Linear(6, 16)
    with torch.no_grad():
        hidden.bias[0] = -20.0
    return nn.Sequential(nn.Embedding(8, 6), hidden, nn.ReLU(), nn.Linear(16, 3))


def _losses(optimizer: tk.Optimizer, storage: Any, dtype: torch.dtype) -> Tensor:
    model = _tokens().to(dtype)
    tokens = torch.randint(0, 7, (64,))
    target = (torch.randn(64, 3) + tokens[:, None] / 4).to(dtype)
    config = tk.TopKastConfig(0.5, 0.2, refresh_every=None)
    mse = lambda apply, batch: (apply(batch[0]) - batch[1]).square().mean()  # noqa: E731
    step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    state, losses = tk.init_state(model, config, optimizer, storage=storage), []
    for _ in range(HALF_STEPS):
        state, metrics = step(state, (tokens, target))
        losses.append(metrics.loss.float())
    moved = tk.dense_params(state)
    assert all(theta.isfinite().all() and theta.dtype == dtype for theta in moved.values())
    assert not torch.equal(moved["1.weight"], model.state_dict()["1.weight"])
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("name", "storage"), [*((name, "compact") for name in EVERY), ("adamw", "dense")]
)
def test_a_run_in_float16_follows_that_in_float32(name: str, storage: Any) -> None:
    expected = _losses(EVERY[name], storage, torch.float32)
    assert expected[-1] < 0.9 * expected[0]
    found = _losses(EVERY[name], storage, torch.float16)
    assert_close(found, expected, rtol=FOLLOWED * torch.finfo(torch.float16).eps, atol=0.0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("optimizer", EVERY.values(), ids=EVERY)
def test_an_update_of_half_precision_is_that_of_float32_rounded_once(
    optimizer: tk.Optimizer, dtype: torch.dtype
) -> None:
    """Gradients reach from the smallest number of float16 to 1, zero among them."""
    generator = torch.Generator().manual_seed(4)
    theta = {n: torch.randn(9, generator=generator).to(dtype) for n in ("0.weight", "bias", "w")}
    wide = {name: tensor.float() for name, tensor in theta.items()}
    state, exact = optimizer.init(theta), optimizer.init(wide)
    for _ in range(6):
        powers = torch.tensor([
            0.0,
            2.0**-24,
            2.0**-14,
            2.0**-7,
            1.0,
            -1.0,
            -(2.0**-10),
            0.5,
            -0.25,
        ])
        grads = {name: (powers * torch.rand(9, generator=generator)).to(dtype) for name in theta}
        updates, state = optimizer.update(grads, state, theta)
        expected, exact = optimizer.update({n: g.float() for n, g in grads.items()}, exact, wide)
        assert all(torch.equal(updates[n], expected[n].to(dtype)) for n in theta)
        assert all(updates[name].dtype == dtype for name in theta)
        for kind, tree in exact.slots.items():
            assert all(torch.equal(state.slots[kind][n], slot) for n, slot in tree.items())


# --- as values -----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", EVERY.values(), ids=EVERY)
def test_an_optimizer_pickles_hashes_and_compares(optimizer: tk.Optimizer) -> None:
    copy = pickle.loads(pickle.dumps(optimizer))
    assert copy == optimizer
    assert hash(copy) == hash(optimizer)
    theta = _weights() | {"0.weight": torch.ones(3, dtype=torch.float64)}
    gradients = {name: torch.ones_like(leaf) for name, leaf in theta.items()}
    one, _ = optimizer.update(gradients, optimizer.init(theta), theta)
    other, _ = copy.update(gradients, copy.init(theta), theta)
    assert all(torch.equal(one[name], other[name]) for name in theta)
    assert [name for name, another in EVERY.items() if another == optimizer] == [
        name for name, another in EVERY.items() if another is optimizer
    ]


def test_optimizers_of_other_numbers_or_names_differ() -> None:
    different = [
        tk.sgd(0.1),
        tk.sgd(0.2),
        tk.sgd(0.1, momentum=0.5),
        tk.adam(0.1),
        tk.adamw(0.1, weight_decay=0.0),
        tk.adam(0.1, eps=1e-6),
        tk.partition({"w*": tk.sgd(0.1), "*": tk.sgd(0.1)}),
        tk.partition({"*": tk.sgd(0.1), "w*": tk.sgd(0.1)}),
        tk.multi_steps(tk.sgd(0.1), 2),
        tk.multi_steps(tk.sgd(0.1), 3),
    ]
    assert len(set(different)) == len(different)
    assert tk.adam(1e-3) == tk.adam()


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (tk.sgd(0.1), "sgd(lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0)"),
        (tk.adam(), "adam(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0)"),
        (tk.adamw(), "adamw(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01)"),
        (tk.lion(), "lion(lr=0.0001, betas=(0.9, 0.99), weight_decay=0.0)"),
        (
            tk.multi_steps(tk.chain(tk.clip_by_global_norm(1), tk.lion()), 4),
            "multi_steps(chain(clip_by_global_norm(1.0), lion(lr=0.0001, betas=(0.9, 0.99), "
            "weight_decay=0.0)), every=4)",
        ),
        (
            tk.partition({"*": tk.lion()}),
            "partition({'*': lion(lr=0.0001, betas=(0.9, 0.99), weight_decay=0.0)})",
        ),
    ],
)
def test_an_optimizer_prints_as_the_call_that_makes_it(optimizer: tk.Optimizer, text: str) -> None:
    assert repr(optimizer) == text
    assert eval(text, {**vars(tk)}) == optimizer
