"""What a step tells beside the state: aux, the norm of the gradient, whether it refreshed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topkast_func as tk
from tests.storage import STORAGES
from tests.test_methods import batch, mse, network

CONFIG = tk.TopKastConfig(0.75, 0.5, refresh_every=2)
both = pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])


def with_outputs(apply: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    outputs = apply(batch[0])
    errors = (outputs - batch[1]).abs()
    return errors.square().mean(), {"outputs": outputs, "worst": (errors.max(), errors.argmax())}


@both
@pytest.mark.parametrize("storage", STORAGES)
def test_what_the_loss_function_returned_beside_the_loss_comes_back(
    compile: Any, storage: Any
) -> None:
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer, storage=storage)
    plain = tk.make_train_step(model, mse, CONFIG, optimizer, compile=compile)
    train_step = tk.make_train_step(model, with_outputs, CONFIG, optimizer, compile=compile)
    after, metrics = train_step(state, batch(0))
    expected, of_plain = plain(state, batch(0))
    assert of_plain.aux == ()
    torch.testing.assert_close(metrics.data_loss, of_plain.data_loss)
    for name, theta in tk.dense_params(expected).items():
        torch.testing.assert_close(tk.dense_params(after)[name], theta)
    outputs = torch.func.functional_call(model, tk.forward_params(state), (batch(0)[0],))
    torch.testing.assert_close(metrics.aux["outputs"], outputs)
    assert not metrics.aux["outputs"].requires_grad
    assert torch.equal(metrics.aux["worst"][0], (outputs - batch(0)[1]).abs().max())


def test_the_penalised_loss_leaves_aux_out() -> None:
    model = network()
    params = dict(model.named_parameters())
    masks = tk.compute_masks(params, CONFIG)
    losses = [
        tk.penalized_loss(model, loss, params, masks, batch(0), CONFIG)
        for loss in (mse, with_outputs)
    ]
    torch.testing.assert_close(*losses)


@both
@pytest.mark.parametrize("storage", STORAGES)
def test_the_norm_is_that_of_the_gradient_on_b_and_of_dense_parameters(
    compile: Any, storage: Any
) -> None:
    config = replace(CONFIG, penalty=None)
    model, optimizer = network(), tk.sgd(0.5)
    state = tk.init_state(model, config, optimizer, storage=storage)
    train_step = tk.make_train_step(model, mse, config, optimizer, compile=compile)
    after, metrics = train_step(state, batch(0))
    old, new = tk.dense_params(state), tk.dense_params(after)
    moved = torch.cat([(new[name] - old[name]).flatten() for name in old])
    if storage == "dense":
        within = {n: m.backward for n, m in tk.masks_of(state).items()}
        gradients = tk.dense_gradients(model, mse, state, batch(0))
        outside = sum(float(g[~within[n]].square().sum()) for n, g in gradients.items())
        assert outside > 0.0
    torch.testing.assert_close(metrics.grad_norm, moved.norm() / 0.5)


def test_a_step_says_whether_it_chose_the_sets_anew() -> None:
    config = replace(CONFIG, explore_until=5)
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, config, optimizer)
    train_step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    told = []
    for seed in range(8):
        state, metrics = train_step(state, batch(seed))
        told.append(bool(metrics.refreshed))
    assert told == [False, False, True, False, True, True, False, False]


def test_a_refresh_that_nan_forbids_is_none() -> None:
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    x, y = batch(0)
    refreshes: list[int] = []

    class Told(tk.Callback):
        def on_refresh(self, before: tk.TrainState, after: tk.TrainState) -> None:
            refreshes.append(int(before.step))

    with pytest.warns(UserWarning, match="no refresh before step 2"):
        tk.train(train_step, state, [(x, y * torch.nan)] * 3, CONFIG, [Told()])
    assert refreshes == []


def test_the_loop_refuses_another_configuration_than_its_step() -> None:
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    with pytest.raises(ValueError, match="made with another configuration"):
        tk.train(train_step, state, [batch(0)], replace(CONFIG, refresh_every=7))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (3.0, "must return a 0-d tensor, got float"),
        ((1.0, {}), "must return a 0-d tensor, got float"),
        (torch.zeros(2), r"must return a 0-d tensor, got shape \(2,\)"),
        ((torch.zeros(()), {"accuracy": 0.5}), "beside the loss must be tensors, got 0.5"),
    ],
)
def test_what_is_no_loss_is_refused(returned: Any, message: str) -> None:
    model, optimizer = nn.Linear(4, 2), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    train_step = tk.make_train_step(model, lambda f, x: returned, CONFIG, optimizer, compile=False)
    with pytest.raises(TypeError, match=message):
        train_step(state, torch.ones(3, 4))


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_what_the_loss_function_returned_shares_no_memory_with_states(
    compile: Any, storage: Any
) -> None:
    def model(params: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ params["weight"] + params["bias"], params["bias"]

    def loss_fn(apply: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        out, bias = apply(x)
        return out.square().mean(), bias

    params = {"weight": torch.randn(8, 8), "bias": torch.ones(8)}
    config, optimizer = tk.TopKastConfig(0.8), tk.sgd(0.1)
    state = tk.init_state(params, config, optimizer, storage=storage)
    step = tk.make_train_step(model, loss_fn, config, optimizer, compile=compile)
    _, metrics = step(state, torch.randn(4, 8))
    metrics.aux.fill_(7.0)
    assert torch.equal(tk.dense_params(state)["bias"], torch.ones(8))
