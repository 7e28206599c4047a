"""Steps of an ensemble under vmap: each member as it would be alone."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

import topkast_func as tk
from tests.storage import STORAGES
from tests.test_methods import METHODS, batch, mse, network
from tests.test_metrics import with_outputs

CONFIG = tk.TopKastConfig(0.75, 0.5, refresh_every=2, explore_until=5)
MEMBERS = 3


def stacked(trees: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def member(tree: Any, i: int) -> Any:
    return tree_map(lambda leaf: leaf[i], tree)


def assert_same(one: Any, other: Any) -> None:
    for found, expected in zip(tree_leaves(one), tree_leaves(other), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("compile", "name", "storage"),
    [
        *itertools.product((False,), ("topkast", "rigl", "gmp"), STORAGES),
        ({"backend": "aot_eager"}, "topkast", "compact"),
    ],
)
def test_each_member_is_as_it_would_be_alone(storage: Any, compile: Any, name: str) -> None:
    until = None if name == "gmp" else 5
    config = replace(CONFIG, method=METHODS[name], explore_until=until)
    model, optimizer = network(), tk.adamw(0.01)
    train_step = tk.make_train_step(model, with_outputs, config, optimizer, compile=compile)
    alone = []
    for seed in range(MEMBERS):
        start = network()
        with torch.no_grad():
            start.get_parameter("0.weight").mul_(1 + seed)
        alone.append(tk.init_state(start, config, optimizer, storage=storage, seed=seed))
    ensemble = stacked(alone)
    for t in range(7):
        batches = [batch(10 * t + i) for i in range(MEMBERS)]
        ensemble, metrics = torch.vmap(train_step)(ensemble, stacked(batches))
        told = [train_step(*pair) for pair in zip(alone, batches, strict=True)]
        alone = [state for state, _ in told]
        for i in range(MEMBERS):
            assert_same(member(metrics, i), told[i][1])
            assert_same(member(ensemble, i), alone[i])


def test_one_state_steps_on_many_batches_and_many_states_on_one() -> None:
    model, optimizer = network(), tk.sgd(0.1)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    state = tk.init_state(model, CONFIG, optimizer)
    batches = [batch(i) for i in range(MEMBERS)]
    after, _ = torch.vmap(train_step, in_dims=(None, 0))(state, stacked(batches))
    expected = [train_step(state, one)[0] for one in batches]
    for i in range(MEMBERS):
        assert_same(member(after, i), expected[i])
    again, _ = torch.vmap(train_step, in_dims=(0, None))(after, batch(7))
    for i in range(MEMBERS):
        assert_same(member(again, i), train_step(expected[i], batch(7))[0])


def test_ensembles_of_ensembles_step() -> None:
    model, optimizer = network(), tk.sgd(0.1)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    state = tk.init_state(model, CONFIG, optimizer)
    states, batches = stacked([stacked([state] * 2)] * 2), stacked([stacked([batch(0)] * 2)] * 2)
    after, _ = torch.vmap(torch.vmap(train_step))(states, batches)
    assert_same(member(member(after, 1), 0), train_step(state, batch(0))[0])


def first_loss(train_step: Any, state: tk.TrainState) -> Any:
    targets = batch(0)[1]
    return lambda inputs: train_step(state, (inputs, targets))[1].loss


def in_forward_mode(of: Any, x: Tensor) -> Any:
    make_dual: Any = forward_ad.make_dual
    with forward_ad.dual_level():
        return of(make_dual(x, torch.ones_like(x)))


DERIVATIVES: dict[str, Any] = {
    "grad": lambda of, x: func.grad(of)(x),
    "vjp": func.vjp,
    "jacrev": lambda of, x: func.jacrev(of)(x),
    "jvp": lambda of, x: func.jvp(of, (x,), (x,)),
    "forward mode": in_forward_mode,
    "vmap of grad": lambda of, x: torch.vmap(func.grad(of))(torch.stack([x, x])),
    "grad of vmap": lambda of, x: func.grad(lambda xs: torch.vmap(of)(xs).sum())(x[None]),
    "of what the loss reads": lambda of, x: func.grad(lambda a: of(x) * a)(torch.ones(())),
}


@pytest.mark.parametrize("tried", [False, True])
@pytest.mark.parametrize("derive", DERIVATIVES.values(), ids=DERIVATIVES.keys())
def test_a_derivative_of_a_step_is_refused_with_the_way_on(derive: Any, tried: bool) -> None:
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    of, x = first_loss(train_step, state), batch(0)[0]
    if tried:
        of(x)
    with pytest.raises(RuntimeError, match=r"^a step is not differentiated.*tk\.penalized_loss"):
        derive(of, x)
    assert of(x).isfinite()


def test_a_step_among_other_dual_tensors_is_made() -> None:
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    with forward_ad.dual_level():
        assert int(train_step(state, batch(0))[0].step) == 1


def test_dense_gradients_and_refreshes_of_each_member_are_as_they_would_be_alone() -> None:
    config, optimizer = replace(CONFIG, method=METHODS["rigl"]), tk.sgd(0.1)
    states = []
    for seed in range(MEMBERS):
        model = network()
        with torch.no_grad():
            model.get_parameter("0.weight").mul_(1 + seed)
        states.append(tk.init_state(model, config, optimizer))
    batches = [batch(i) for i in range(MEMBERS)]

    def run(state: tk.TrainState, batch: Any) -> Any:
        gradients = tk.dense_gradients(model, mse, state, batch)
        return gradients, tk.refresh(state, config, gradients)

    found = torch.vmap(run)(stacked(states), stacked(batches))
    for i, pair in enumerate(zip(states, batches, strict=True)):
        assert_same(member(found, i), run(*pair))


class Reads:
    """A loss that closes over a number."""

    factor: Any = 1.0

    def __call__(self, apply: Any, batch: Any) -> Tensor:
        loss: Tensor = mse(apply, batch) * self.factor
        return loss


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])
def test_where_nothing_is_mapped_all_is_as_outside(compile: Any) -> None:
    model, optimizer, loss = network(), tk.sgd(0.1), Reads()
    state, given = tk.init_state(model, CONFIG, optimizer), batch(0)
    x = given[0]

    def made() -> Any:
        train_step = tk.make_train_step(model, loss, CONFIG, optimizer, compile=compile)
        return lambda: train_step(state, given)[1].loss

    uses = [
        (made(), made()),
        (lambda: tk.dense_gradients(model, mse, state, given),) * 2,
        (lambda: tk.refresh(state, CONFIG),) * 2,
        (lambda: tk.sparse_module(state, model)(x),) * 2,
        (lambda: torch.tensor(tk.training_flops(model, state, x)),) * 2,
    ]
    for use, again in uses:
        found = torch.vmap(lambda _, use=use: use())(torch.ones(2))
        for i in range(2):
            assert_same(member(found, i), again())

    def closed(factor: Tensor) -> Tensor:
        loss.factor = factor
        result: Tensor = made()()
        return result

    with pytest.raises(RuntimeError, match=r"a tensor that the model or loss_fn reads and is not"):
        torch.vmap(closed)(torch.ones(2))


READERS = ("dense_gradients", "refresh", "training_flops", "sparse_module")
UNFOLLOWED = ("sparse_module", "forward mode")
"""It reads no tensor that forward mode follows."""


@pytest.mark.parametrize(
    ("name", "derive"),
    [
        (reader, derive)
        for reader in READERS
        for way, derive in DERIVATIVES.items()
        if (reader, way) != UNFOLLOWED
    ],
)
def test_what_reads_numbers_is_not_differentiated(name: str, derive: Any) -> None:
    model, optimizer = network(), tk.sgd(0.1)
    state, (x, y) = tk.init_state(model, CONFIG, optimizer), batch(0)

    uses: dict[str, Any] = {
        "dense_gradients": lambda x: tk.dense_gradients(model, mse, state, (x, y)),
        "refresh": lambda x: tk.refresh(state, CONFIG, {"0.weight": x}),
        "training_flops": lambda x: torch.tensor(tk.training_flops(model, state, x)),
        "sparse_module": lambda x: tk.sparse_module(state, model)(x),
    }
    with pytest.raises(RuntimeError, match=rf"^{name} is not differentiated.*tk\.penalized_loss"):
        derive(lambda x: sum(leaf.float().sum() for leaf in tree_leaves(uses[name](x))), x)


def test_an_ensemble_of_no_members_is_named() -> None:
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    nobody = tree_map(lambda leaf: leaf[None][:0], state)
    with pytest.raises(ValueError, match="an ensemble of no members"):
        torch.vmap(train_step, in_dims=(0, None))(nobody, batch(0))


def test_members_at_different_stages_are_named() -> None:
    config = replace(CONFIG, forward_sparsity=tk.staged({0: 0.5, 2: 0.75}), explore_until=None)
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, config, optimizer)
    train_step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    late = state._replace(step=state.step + 1)
    with pytest.raises(
        ValueError, match="differs in shape, as their steps are of different stages"
    ):
        torch.vmap(train_step, in_dims=(0, None))(stacked([state, late]), batch(0))
