"""Powerpropagation: its powers, their gradient, and training with it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.func import functional_call, grad

import topkast_func as tk
from topkast_func.powerprop import phi_of, theta_of
from topkast_func.testing import MODERATE, check_outside_untouched, weights

CONFIG = tk.TopKastConfig(0.7, 0.4, refresh_every=3, powerprop=2.0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def mse(apply: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(apply(batch[0]), batch[1])


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)


@given(weights(dtypes=(torch.float64,), entries=MODERATE))
def test_one_power_undoes_the_other(theta: Tensor) -> None:
    torch.testing.assert_close(theta_of(phi_of(theta, 3.0), 3.0), theta)
    assert torch.equal(theta_of(theta, 2.0), theta * theta.abs())


@pytest.mark.parametrize("exponent", [1.5, 2.0, 4.0])
def test_the_gradient_is_that_of_the_power_and_zero_at_zero(exponent: float) -> None:
    phi = torch.tensor([-2.0, 0.0, 0.5], dtype=torch.float64)
    found = grad(lambda p: theta_of(p, exponent).sum())(phi)
    torch.testing.assert_close(found, exponent * phi.abs() ** (exponent - 1))


@pytest.mark.parametrize("storage", ["compact", "dense"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_step_is_the_chain_rule_at_phi(storage: Any, compile: bool) -> None:
    model, optimizer = network(), tk.sgd(0.1)
    config = replace(CONFIG, penalty=None)
    state = tk.init_state(model, config, optimizer, storage=storage)
    theta, masks = tk.dense_params(state), tk.masks_of(state)
    torch.testing.assert_close(theta, dict(model.named_parameters()))
    after, _ = tk.make_train_step(model, mse, config, optimizer, compile=compile)(state, batch(0))
    loss = lambda params: tk.penalized_loss(model, mse, params, masks, batch(0), config)  # noqa: E731
    gradients = grad(loss)(theta)
    for name in masks:
        phi = phi_of(theta[name], 2.0)
        moved = theta_of(phi - 0.1 * gradients[name] * 2 * phi.abs(), 2.0)
        torch.testing.assert_close(tk.dense_params(after)[name], moved, rtol=1e-4, atol=1e-6)
    check_outside_untouched(state, after)


@pytest.mark.parametrize("method", [tk.topkast(), tk.set(), tk.rigl(), tk.ste(), tk.static()])
def test_it_composes_with_every_method(method: tk.Method) -> None:
    config = replace(CONFIG, method=method)
    model, optimizer = network(), tk.sgd(0.1, momentum=0.9)
    trajectories = []
    for storage in ("compact", "dense"):
        state = tk.init_state(model, config, optimizer, storage=storage)
        step = tk.make_train_step(model, mse, config, optimizer, compile=False)
        for seed in range(8):
            state, metrics = step(state, batch(seed))
            assert metrics.loss.isfinite()
        trajectories.append(tk.forward_params(state))
    torch.testing.assert_close(*trajectories, rtol=1e-4, atol=1e-6)


def test_a_dense_network_trains_phi_as_the_chain_rule_has_it() -> None:
    config = replace(CONFIG, method=tk.dense())
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, config, optimizer)
    theta = tk.dense_params(state)
    after, _ = tk.make_train_step(model, mse, config, optimizer, compile=False)(state, batch(0))
    apply = lambda params: mse(lambda x: functional_call(model, params, (x,)), batch(0))  # noqa: E731
    gradients = grad(apply)(theta)
    for name in ("0.weight", "2.weight"):
        phi = phi_of(theta[name], 2.0)
        moved = theta_of(phi - 0.1 * gradients[name] * 2 * phi.abs(), 2.0)
        torch.testing.assert_close(tk.dense_params(after)[name], moved)
    torch.testing.assert_close(
        tk.dense_params(after)["0.bias"], theta["0.bias"] - 0.1 * gradients["0.bias"]
    )


@pytest.mark.parametrize("sparse", [None, lambda name, _: name == "0.weight"])
def test_a_dense_network_trains_phi_beyond_a_refresh_and_is_saved(
    sparse: Any, tmp_path: Any
) -> None:
    config = replace(CONFIG, method=tk.dense(), refresh_every=2, sparse=sparse)
    model, optimizer = network(), tk.sgd(0.1)
    state = tk.init_state(model, config, optimizer)
    step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    for seed in range(3):
        state, _ = step(state, batch(seed))
    tk.save(state, tmp_path / "state", config)
    loaded = tk.load(tmp_path / "state", config if sparse else None, model, optimizer)
    torch.testing.assert_close(tk.dense_params(loaded), tk.dense_params(state), rtol=0, atol=0)
    assert list(loaded.exponents) == (["0.weight"] if sparse else ["0.weight", "2.weight"])


def test_a_grown_weight_can_learn() -> None:
    config = replace(CONFIG, method=tk.set(drop_fraction=0.5))
    state = tk.init_state(network(), config, tk.sgd(0.1))
    after = tk.refresh(state, config)
    for name, masks in tk.masks_of(after).items():
        entered = masks.forward & ~tk.masks_of(state)[name].forward
        assert entered.any()
        assert (tk.dense_params(after)[name][entered] != 0).all()


def test_a_state_of_another_exponent_is_refused(tmp_path: Any) -> None:
    model, optimizer = network(), tk.sgd(0.1)
    plain = tk.init_state(model, replace(CONFIG, powerprop=1.0), optimizer)
    powered = tk.init_state(model, CONFIG, optimizer)
    step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    with pytest.raises(ValueError, match=r"powerprop is 1.0, the configuration asks for 2.0"):
        step(plain, batch(0))
    with pytest.raises(ValueError, match=r"powerprop is 1.0, .* asks for 2.0: begin anew"):
        tk.refresh(plain, CONFIG)
    with pytest.raises(ValueError, match=r"asks for 3\.0"):
        tk.make_train_step(model, mse, replace(CONFIG, powerprop=3.0), optimizer)(powered, batch(0))
    tk.save(powered, tmp_path / "state")
    with pytest.raises(ValueError, match=r"powerprop is .*2.0.*, the configuration asks for 1.0"):
        tk.load(tmp_path / "state", replace(CONFIG, powerprop=1.0))
    loaded = tk.load(tmp_path / "state", CONFIG, model, optimizer)
    torch.testing.assert_close(tk.dense_params(loaded), tk.dense_params(powered), rtol=0, atol=0)


def test_a_scalar_keeps_its_dtype(tmp_path: Any) -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(3.0))
    config = replace(CONFIG, sparse="scale")
    state = tk.init_state(model, config, tk.sgd(0.1))
    torch.testing.assert_close(tk.dense_params(state)["scale"], torch.tensor(3.0))
    tk.save(state, tmp_path / "state")
    tk.load(tmp_path / "state", config, model)


@pytest.mark.parametrize("method", [tk.topkast(), tk.static(), tk.dense()])
def test_a_weight_that_is_zero_everywhere_and_could_not_move_is_refused(method: tk.Method) -> None:
    model = network()
    nn.init.zeros_(model.get_parameter("2.weight"))
    config = replace(CONFIG, method=method)
    told = r"params\['2.weight'\] is zero everywhere .* powerprop=2.0 .* keep_dense, or .* be 1"
    with pytest.raises(ValueError, match=told):
        tk.init_state(model, config, tk.sgd(0.1))
    for way_on in (replace(config, keep_dense="2.weight"), replace(config, powerprop=1.0)):
        state = tk.init_state(model, way_on, tk.sgd(0.1))
        after, _ = tk.make_train_step(model, mse, way_on, tk.sgd(0.1), compile=False)(
            state, batch(0)
        )
        assert tk.dense_params(after)["2.weight"].any()


def test_an_exponent_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"powerprop must be in \[1.0, inf\), got 0.5"):
        tk.TopKastConfig(powerprop=0.5)


@pytest.mark.parametrize("storage", ["compact", "dense"])
def test_weights_are_given_as_theta_and_phi_of_a_sparse_module_is_turned_back(
    storage: Any,
) -> None:
    model, optimizer, a = network(), tk.sgd(0.1), CONFIG.powerprop
    given = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = tk.init_state(model, CONFIG, optimizer, storage=storage)
    torch.testing.assert_close(tk.dense_params(expected), given)
    sparsifier = tk.sparsify(model, CONFIG)
    theta = {
        n: p * p.abs() ** (a - 1) if n in sparsifier.masks() else p
        for n, p in model.named_parameters()
    }
    assert not torch.allclose(model.get_parameter("0.weight"), given["0.weight"])
    for params in (given, theta):
        state = tk.init_state(params, CONFIG, optimizer, storage=storage)
        torch.testing.assert_close(tk.dense_params(state), given)
        torch.testing.assert_close(tk.masks_of(state), tk.masks_of(expected))
