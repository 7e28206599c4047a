"""A module whose weights have sets of their own is none of those that a state is made for."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import topkast_func as tk

CONFIG = tk.TopKastConfig(0.7, 0.4, refresh_every=3)
POWERED = replace(CONFIG, powerprop=2.0)
OPTIMIZER = tk.sgd(0.1)
BATCH = (torch.ones(4, 6), torch.zeros(4, 3))


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def mse(apply: Any, batch: Any) -> Tensor:
    return mse_loss(apply(batch[0]), batch[1])


def theta_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def state() -> tk.TrainState:
    return tk.init_state(network(), CONFIG, OPTIMIZER)


MASKS = tk.masks_of(state())
READERS: dict[str, Callable[[Any], Any]] = {
    "init_state": lambda model: tk.init_state(model, CONFIG, OPTIMIZER),
    "make_train_step": lambda model: tk.make_train_step(model, mse, CONFIG, OPTIMIZER),
    "plan": lambda model: tk.plan(model, CONFIG, 2),
    "sparse_forward": lambda model: tk.sparse_forward(model, theta_of(model), MASKS, BATCH[0]),
    "penalized_loss": lambda model: tk.penalized_loss(
        model, mse, theta_of(model), MASKS, BATCH, CONFIG
    ),
    "index_masks": lambda model: tk.index_masks(model, MASKS),
    "dense_gradients": lambda model: tk.dense_gradients(model, mse, state(), BATCH),
    "training_flops": lambda model: tk.training_flops(model, state(), BATCH[0]),
    "sparse_module": lambda model: tk.sparse_module(state(), model),
}
each_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())


def sparsified(config: tk.TopKastConfig = CONFIG) -> Any:
    model = network()
    tk.sparsify(model, config)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "sparsified": sparsified,
    "powered": lambda: sparsified(POWERED),
    "part": lambda: nn.Sequential(*network()[:2], sparsified()[2]),
    "compiled": lambda: torch.compile(sparsified()),
    "seed": lambda: nn.Sequential(tk.TopKastLinear(6, 8, 0.5, 0.2), *network()[1:]),
}


@each_reader
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_a_model_with_sets_of_its_own_is_refused(
    make: Callable[[], Any], read: Callable[[Any], Any]
) -> None:
    told = r"weights \['[02].weight'.* have sets of their own.* sparsifier\.dense_params\(\)"
    with pytest.raises(ValueError, match=told):
        read(make())
    read(network())


def test_a_file_is_not_loaded_for_a_model_with_sets_of_its_own(tmp_path: Any) -> None:
    tk.save(state(), tmp_path / "state", CONFIG)
    with pytest.raises(ValueError, match="have sets of their own"):
        tk.load(tmp_path / "state", model=sparsified())
    tk.load(tmp_path / "state", model=network())


def test_a_frozen_part_with_sets_of_its_own_computes_with_them() -> None:
    teacher = sparsified(POWERED).requires_grad_(False)
    model = nn.Sequential(teacher, nn.Linear(3, 3))
    started = tk.init_state(model, CONFIG, OPTIMIZER)
    step = tk.make_train_step(model, mse, CONFIG, OPTIMIZER, compile=False)
    found = step(started, BATCH)[1].data_loss
    alpha = tk.forward_params(started)
    expected = nn.functional.linear(teacher(BATCH[0]), alpha["1.weight"], alpha["1.bias"])
    torch.testing.assert_close(found, mse_loss(expected, BATCH[1]))


PARAMETERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "init_state": lambda params: tk.init_state(params, POWERED, OPTIMIZER),
    "compute_masks": lambda params: tk.compute_masks(params, POWERED),
    "allocate": lambda params: tk.allocate(params, POWERED),
    "plan": lambda params: tk.plan(params, POWERED, 2),
    "exploration_penalty": lambda params: tk.exploration_penalty(params, MASKS, POWERED),
    "sparse_forward": lambda params: tk.sparse_forward(network(), params, MASKS, BATCH[0]),
}


@pytest.mark.parametrize("read", PARAMETERS.values(), ids=PARAMETERS.keys())
def test_phi_is_not_taken_for_theta(read: Callable[[Any], Any]) -> None:
    model = network()
    given = theta_of(model)
    sparsifier = tk.sparsify(model, POWERED)
    held = dict(model.named_parameters())
    for params in (held, {n: p.detach() for n, p in held.items()}):
        told = r"params \['0\.weight', '2\.weight'\] are φ .* sparsifier\.dense_params\(\)"
        with pytest.raises(ValueError, match=told):
            read(params)
    theta = sparsifier.dense_params()
    torch.testing.assert_close(theta, given)
    read(theta)
    if "forward" in str(read):
        return
    tk.densify(model)
    read(dict(model.named_parameters()))


@pytest.mark.parametrize("config", [CONFIG, POWERED], ids=["theta", "phi"])
def test_a_step_goes_on_from_a_sparsified_model(config: tk.TopKastConfig) -> None:
    model, plain = network(), network()
    sparsifier = tk.sparsify(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (mse(model, BATCH) + sparsifier.penalty()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    sparsifier.step()
    theta, held = sparsifier.dense_params(), copy.deepcopy(model.state_dict())
    plain.load_state_dict(theta, strict=False)
    masks = sparsifier.masks()
    started = tk.init_state(plain, config, OPTIMIZER, masks=masks)
    after, _ = tk.make_train_step(plain, mse, config, OPTIMIZER, compile=False)(started, BATCH)
    optimizer.zero_grad()
    (mse(model, BATCH) + sparsifier.penalty()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    torch.testing.assert_close(tk.dense_params(after), sparsifier.dense_params())
    theta["0.weight"].zero_()
    assert not torch.equal(sparsifier.dense_params()["0.weight"], theta["0.weight"])
    assert not torch.equal(model.state_dict()["0.weight"], held["0.weight"])
