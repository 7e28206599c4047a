"""What is tried before a step, and again where the forward pass may have changed."""

import itertools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import topkast_func as tk
from tests.storage import STORAGES

CONFIG = tk.TopKastConfig(forward_sparsity=0.7, backward_sparsity=0.4)
OPTIMIZER = tk.adamw(0.01)
AOT = {"backend": "aot_eager"}
BATCH = (torch.ones(4, 6), torch.zeros(4, 3))
compiled_or_not = pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "compiled"])
every_storage = pytest.mark.parametrize("storage", STORAGES)


def mse(apply: Any, batch: Any) -> Tensor:
    return nn.functional.mse_loss(apply(batch[0]), batch[1])


class Late(nn.Module):
    """A network that begins to do something to its hidden activations, or to write."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.last.bias.requires_grad_(False)
        self.late: Callable[[Late, Tensor], None] | None = None
        self.recompute: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.late is not None:
            self.late(self, x)
        hidden = torch.tanh(self.first(x))
        if self.recompute is None:
            out: Tensor = self.last(hidden)
        else:
            out = checkpoint(self.last, hidden, use_reentrant=self.recompute)
        return out


def begun(
    model: nn.Module, compile: Any = False, storage: Any = "compact", loss: Any = mse
) -> tuple[tk.TrainState, Callable[..., Any]]:
    state = tk.init_state(model, CONFIG, OPTIMIZER, storage=storage)
    train_step = tk.make_train_step(model, loss, CONFIG, OPTIMIZER, compile=compile)
    for _ in range(2):
        state, _ = train_step(state, BATCH)
    return state, train_step


def write_to(name: str, guarded: bool) -> Callable[[Late, Tensor], None]:
    def write(model: Late, x: Tensor) -> None:
        owner, key = name.split(".")
        with torch.no_grad() if guarded else nullcontext():
            getattr(model._modules[owner], key).mul_(0.5)

    return write


WRITTEN = ("first.weight", "first.bias", "last.bias")


@pytest.mark.parametrize(
    ("name", "guarded", "storage", "compile"),
    [
        *itertools.product(WRITTEN, (True, False), STORAGES, (False,)),
        *((name, True, "compact", AOT) for name in WRITTEN),
        ("first.weight", False, "dense", AOT),
    ],
)
def test_a_parameter_that_is_written_to_after_the_first_step_is_named(
    name: str, guarded: bool, storage: Any, compile: Any
) -> None:
    model = Late()
    state, train_step = begun(model, compile, storage)
    model.late = write_to(name, guarded)
    with pytest.raises(ValueError, match=rf"changes parameters \['{name}'\].*go on from one that"):
        train_step(state, BATCH)


def test_a_write_that_torch_itself_refuses_leaves_the_state_whole() -> None:
    model = Late()
    state, train_step = begun(model)
    before = tree_map(torch.clone, state)
    model.late = write_to("first.bias", guarded=False)
    with pytest.raises(ValueError, match=r"first\.bias"):
        train_step(state, BATCH)
    assert all(map(torch.equal, tree_leaves(state), tree_leaves(before)))
    model.late = None
    assert int(train_step(state, BATCH)[0].step) == 3


def write_to_input(_: Late, x: Tensor) -> None:
    x.mul_(0.5)


def write_to_data_of_input(_: Late, x: Tensor) -> None:
    x.data.mul_(0.5)


@pytest.mark.parametrize(
    ("write", "compile"),
    [(write_to_input, False), (write_to_input, AOT), (write_to_data_of_input, AOT)],
)
def test_inputs_that_are_written_to_after_the_first_step_are_named(
    write: Any, compile: Any
) -> None:
    model = Late()
    state, train_step = begun(model, compile)
    model.late = write
    with pytest.raises(ValueError, match="changes its inputs in place: copy them first"):
        train_step(state, tree_map(torch.clone, BATCH))


@pytest.mark.parametrize(
    ("reentrant", "storage", "compile"),
    [
        *itertools.product((False, True), STORAGES, (False,)),
        *((False, "compact", AOT), (True, "dense", AOT)),
    ],
)
def test_checkpointing_that_begins_after_the_first_step_is_refused(
    reentrant: bool, storage: Any, compile: Any
) -> None:
    model = Late()
    state, train_step = begun(model, compile, storage)
    model.recompute = reentrant
    with pytest.raises(RuntimeError, match=r"torch\.utils\.checkpoint.*take it out"):
        train_step(state, BATCH)


@compiled_or_not
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("differentiable", [False, True])
def test_reentrant_checkpointing_is_refused_with_the_way_on(
    differentiable: bool, compile: Any
) -> None:
    def loss(apply: Any, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_() if differentiable else batch[0]
        recomputed: Tensor = checkpoint(apply, x, use_reentrant=True)
        return recomputed.square().mean() + mse(apply, batch)

    with pytest.raises(RuntimeError, match=r"torch\.utils\.checkpoint.*take it out"):
        begun(Late(), compile, loss=loss)


def test_what_is_computed_without_a_gradient_is_no_checkpoint() -> None:
    def loss(apply: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            target = apply(batch[0])
        return (apply(batch[0]) - target - 1).square().mean()

    assert int(begun(Late(), loss=loss)[0].step) == 2


class Embedded(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.table, self.last = kind(10, 6, sparse=True, **options), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.table(x))
        return out


@pytest.mark.parametrize(
    ("kind", "shape", "storage", "compile"),
    [
        (nn.Embedding, (4,), "compact", False),
        (nn.Embedding, (4,), "dense", False),
        (nn.EmbeddingBag, (4, 2), "dense", False),
        (nn.Embedding, (4,), "compact", AOT),
        (nn.EmbeddingBag, (4, 2), "dense", AOT),
    ],
)
def test_an_embedding_with_sparse_gradients_is_named(
    kind: Any, shape: Any, storage: Any, compile: Any
) -> None:
    model = Embedded(kind)
    state = tk.init_state(model, CONFIG, OPTIMIZER, storage=storage)
    train_step = tk.make_train_step(model, mse, CONFIG, OPTIMIZER, compile=compile)
    batch = (torch.ones(shape, dtype=torch.int64), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"gradients of \['table.weight'\] are sparse .*=False"):
        train_step(state, batch)
    model.table.sparse = False
    assert int(train_step(state, batch)[0].step) == 1


def test_a_frozen_embedding_has_no_gradient_to_be_sparse() -> None:
    model = Embedded(nn.Embedding)
    model.table.weight.requires_grad_(False)
    state = tk.init_state(model, CONFIG, OPTIMIZER)
    train_step = tk.make_train_step(model, mse, CONFIG, OPTIMIZER, compile=False)
    batch = (torch.ones(4, dtype=torch.int64), torch.zeros(4, 3))
    assert int(train_step(state, batch)[0].step) == 1


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_of_a_parameter_which_no_step_calls_is_named(register: str) -> None:
    model = Late()
    handle = getattr(model.first.weight, register)(lambda _: None)
    with pytest.raises(ValueError, match=r"'first.weight' has a hook .*tk.chain.*tk.sparsify"):
        begun(model)
    handle.remove()
    assert int(begun(model)[0].step) == 2


def test_the_forward_pass_of_weights_by_name_does_not_change_them() -> None:
    model = Late()
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = tk.compute_masks(theta, CONFIG)
    model.late = write_to("first.bias", guarded=True)
    with pytest.raises(ValueError, match=r"changes parameters \['first.bias'\]"):
        tk.sparse_forward(model, theta, masks, BATCH[0])
    model.late = None
    with torch.inference_mode():
        theta = {name: tensor.clone() for name, tensor in theta.items()}
        assert tk.sparse_forward(model, theta, masks, BATCH[0]).shape == (4, 3)


def test_a_trial_after_a_step_that_fails_hides_no_other_error() -> None:
    model = Late()
    state, train_step = begun(model)

    def broken(*_: Any) -> None:
        raise AttributeError("of the model itself")

    model.late = broken
    with warnings.catch_warnings(), pytest.raises(AttributeError, match="of the model itself"):
        train_step(state, BATCH)
