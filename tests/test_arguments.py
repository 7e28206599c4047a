"""Arguments at each other's place, or of another kind: each is named in a sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map

import topkast_func as tk

CONFIG = tk.TopKastConfig(0.5, 0.25)
OPTIMIZER = tk.sgd(0.1)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))


def mse(apply: Any, batch: Any) -> Any:
    return functional.mse_loss(apply(batch[0]), batch[1])


def made(**options: Any) -> Callable[..., Any]:
    return tk.make_train_step(network(), mse, CONFIG, OPTIMIZER, compile=False, **options)


BATCH = (torch.ones(4, 6), torch.zeros(4, 3))
READERS: dict[str, Callable[[Any], Any]] = {
    "train_step": lambda state: made()(state, BATCH),
    "refresh": lambda state: tk.refresh(state, CONFIG),
    "dense_params": tk.dense_params,
    "forward_params": tk.forward_params,
    "masks_of": tk.masks_of,
    "save": lambda state: tk.save(state, Path("nowhere")),
    "summary": tk.summary,
    "explain": tk.explain,
    "to_sparse": tk.to_sparse,
    "sparse_module": lambda state: tk.sparse_module(state, network()),
    "save_sharded": lambda state: tk.save_sharded(state, "nowhere"),
    "gather": tk.gather,
    "train": lambda state: tk.train(made(), state, [BATCH], CONFIG),
    "training_flops": lambda state: tk.training_flops(network(), state, BATCH[0]),
    "dense_gradients": lambda state: tk.dense_gradients(network(), mse, state, BATCH),
}
every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())


@every_reader
def test_what_is_no_state_is_named(read: Callable[[Any], Any]) -> None:
    sparsifier = tk.sparsify(network(), CONFIG)
    for other in (network(), dict(network().named_parameters()), BATCH, sparsifier):
        kind = type(other).__name__
        told = rf"state must be a TrainState, got {kind}: .* sparsifier\.summary\(\)"
        with pytest.raises(TypeError, match=told):
            read(other)


@every_reader
def test_an_ensemble_of_states_is_named(read: Callable[[Any], Any]) -> None:
    state = tk.init_state(network(), CONFIG, OPTIMIZER)
    stacked = tree_map(lambda *leaves: torch.stack(leaves), state, state)
    with pytest.raises(ValueError, match=r"an ensemble of states, stacked: .* torch\.vmap"):
        read(stacked)


@pytest.mark.parametrize("config", [None, {"forward_sparsity": 0.5}, OPTIMIZER])
def test_what_is_no_configuration_is_named(config: Any) -> None:
    params = {name: p.detach() for name, p in network().named_parameters()}
    state = tk.init_state(params, CONFIG, OPTIMIZER)
    uses: list[Callable[[], Any]] = [
        lambda: tk.init_state(network(), config, OPTIMIZER),
        lambda: tk.make_train_step(network(), mse, config, OPTIMIZER),
        lambda: tk.refresh(state, config),
        lambda: tk.compute_masks(params, config),
        lambda: tk.allocate(params, config),
        lambda: tk.exploration_penalty(params, tk.masks_of(state), config),
        lambda: tk.penalized_loss(network(), mse, params, tk.masks_of(state), BATCH, config),
        lambda: tk.sparsify(network(), config),
    ]
    for use in uses:
        with pytest.raises(TypeError, match="config must be a TopKastConfig, got"):
            use()


def test_parameters_that_are_a_module_are_named() -> None:
    state = tk.init_state(network(), CONFIG, OPTIMIZER)
    uses: list[Callable[[Any], Any]] = [
        lambda params: tk.compute_masks(params, CONFIG),
        lambda params: tk.exploration_penalty(params, tk.masks_of(state), CONFIG),
        lambda params: tk.sparse_forward(network(), params, tk.masks_of(state), BATCH[0]),
    ]
    for use in uses:
        with pytest.raises(TypeError, match="params must map names to tensors, got Sequential"):
            use(network())


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss(), functional.mse_loss])
def test_a_loss_of_torch_itself_is_named_with_the_way_on(loss: Any) -> None:
    with pytest.raises(TypeError, match=r"(Loss|mse_loss) takes outputs and targets: pass a func"):
        tk.make_train_step(network(), loss, CONFIG, OPTIMIZER)


def test_a_model_in_the_place_of_the_loss_is_named() -> None:
    model: Any = network()
    told = r"loss_fn must be a function .* got Sequential, .*: the order is make_train_step\(model"
    with pytest.raises(TypeError, match=told):
        tk.make_train_step(mse, model, CONFIG, OPTIMIZER)


def test_a_batch_of_arrays_is_named() -> None:
    state = tk.init_state(network(), CONFIG, OPTIMIZER)
    with pytest.raises(TypeError, match="inputs must be a Tensor, got ndarray"):
        made(engine="reference")(state, (BATCH[0].numpy(), BATCH[1]))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_numbers_of_eight_bits_are_named(name: str, dtype: torch.dtype) -> None:
    params = {"weight": torch.ones(4, 6), "bias": torch.ones(4)}
    params[name] = params[name].to(dtype)
    with pytest.raises(TypeError, match=rf"params\['{name}'\] is {dtype}, in which torch does not"):
        tk.init_state(params, CONFIG, OPTIMIZER)
