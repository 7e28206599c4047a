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
EAGER = {"backend": "eager"}
BATCH = (torch.ones(4, 6), torch.zeros(4, 3))
compiled_or_not = pytest.mark.parametrize("compile", [False, EAGER], ids=["eager", "compiled"])
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
        ("first.bias", True, "compact", EAGER),
        ("first.weight", False, "dense", EAGER),
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


def _clamp(model: Late, x: Tensor) -> None:
    with torch.no_grad():
        model.first.weight.clamp_(-100.0, 100.0)


def _put_anew(model: Any, x: Tensor) -> None:
    model.first._parameters["weight"] = model.first.weight.clone()


def _clamp_input(model: Late, x: Tensor) -> None:
    x.clamp_(-100.0, 100.0)


@pytest.mark.parametrize(
    ("late", "told"),
    [
        (_clamp, r"\['first.weight'\]"),
        (_put_anew, r"\['first.weight'\]"),
        (_clamp_input, "changes its inputs in place"),
    ],
)
def test_a_write_that_has_no_effect_as_yet_is_refused_at_once(late: Any, told: str) -> None:
    model = Late()
    model.late = late
    with pytest.raises(ValueError, match=told):
        begun(model)


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
    [(write_to_input, False), (write_to_input, EAGER), (write_to_data_of_input, EAGER)],
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
        *((False, "compact", EAGER), (True, "dense", EAGER)),
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
        (nn.Embedding, (4,), "compact", EAGER),
        (nn.EmbeddingBag, (4, 2), "dense", EAGER),
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


class Listed(nn.Module):
    """A layer that reads its weight from a list, which nothing replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.held = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.held[0].T + self.layer.bias


@compiled_or_not
def test_a_loss_of_the_weights_that_the_module_has_is_refused(compile: Any) -> None:
    model = Late()

    def decayed(apply: Any, batch: Any) -> Tensor:
        return mse(apply, batch) + 0.1 * model.first.weight.square().sum()

    with pytest.raises(ValueError, match=r"depends on \['first.weight'\] as the module has them"):
        begun(model, compile, loss=decayed)
    with pytest.raises(ValueError, match=r"depends on \['layer.weight'\] as the module has them"):
        begun(Listed(), compile)


def test_a_loss_may_read_the_original_weights_without_a_gradient() -> None:
    model = Late()

    def near_the_original(apply: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            target = model(batch[0]) + 1
        return mse(apply, (batch[0], target))

    assert int(begun(model, loss=near_the_original)[0].step) == 2


def test_parameters_of_others_that_no_step_trains_are_told_of() -> None:
    scale = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match=r"none of the model, of shapes \[\(2,\)\].*not trained"):
        begun(Late(), loss=lambda apply, batch: scale.prod() * mse(apply, batch))
    begun(Late(), loss=lambda apply, batch: scale.detach().prod() * mse(apply, batch))


@compiled_or_not
def test_a_loss_that_is_differentiated_already_is_refused(compile: Any) -> None:
    def backward(apply: Any, batch: Any) -> Tensor:
        loss = mse(apply, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with pytest.raises(ValueError, match=r"loss_fn calls backward\(\): it is to return the loss"):
        begun(Late(), compile, loss=backward)


@compiled_or_not
def test_a_loss_that_takes_a_batch_apart_leaves_that_of_the_caller(compile: Any) -> None:
    model, batch = Late(), dict(zip("xy", BATCH, strict=True))
    state = tk.init_state(model, CONFIG, OPTIMIZER)

    def popping(apply: Any, batch: Any) -> Tensor:
        return nn.functional.mse_loss(apply(batch.pop("x")), batch["y"])

    train_step = tk.make_train_step(model, popping, CONFIG, OPTIMIZER, compile=compile)
    for step in (1, 2):
        state, _ = train_step(state, batch)
        assert (int(state.step), [*batch]) == (step, ["x", "y"])


def test_batches_of_other_layouts_are_tried_as_any() -> None:
    batch = (BATCH[0].to_sparse(), BATCH[1])
    model = Late()
    state = tk.init_state(model, CONFIG, OPTIMIZER)
    train_step = tk.make_train_step(
        model,
        lambda apply, batch: mse(apply, (batch[0].to_dense(), batch[1])),
        CONFIG,
        OPTIMIZER,
        compile=False,
    )
    assert int(train_step(state, batch)[0].step) == 1


def test_a_batch_without_values_is_named() -> None:
    with pytest.raises(ValueError, match="the batch holds tensors on the meta device"):
        tk.dense_gradients(
            Late(),
            mse,
            tk.init_state(Late(), CONFIG, OPTIMIZER),
            tree_map(lambda t: t.to("meta"), BATCH),
        )


def test_a_gradient_at_alpha_of_a_loss_that_does_not_see_it_is_refused() -> None:
    model = Late()
    state = tk.init_state(model, CONFIG, OPTIMIZER)
    with pytest.raises(ValueError, match="does not depend on what is trained"):
        tk.dense_gradients(model, lambda apply, batch: mse(model, batch), state, BATCH)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.jit.script], ids=["parallel", "script"])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_module_that_runs_with_no_other_weights_is_named(wrap: Any) -> None:
    model = wrap(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)))
    with pytest.raises(TypeError, match=r"model is a .*: give the module that is in it"):
        tk.init_state(model, CONFIG, OPTIMIZER)
    with pytest.raises(TypeError, match=r"model is a .*: give the module that is in it"):
        tk.make_train_step(model, mse, CONFIG, OPTIMIZER)


@compiled_or_not
def test_cached_parametrizations_are_refused_around_a_step_and_right_within_the_loss(
    compile: Any,
) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Linear(8, 3))
    config = tk.TopKastConfig(0.7, 0.4, sparse=["*original1"])
    state = tk.init_state(model, config, OPTIMIZER)

    def loss_within(apply: Any, batch: Any) -> Tensor:
        with nn.utils.parametrize.cached():
            return mse(apply, batch)

    step = tk.make_train_step(model, mse, config, OPTIMIZER, compile=compile)
    with nn.utils.parametrize.cached(), pytest.raises(RuntimeError, match=r"within .*cached\(\) a"):
        step(state, BATCH)
    expected, _ = step(state, BATCH)
    with nn.utils.parametrize.cached(), pytest.raises(RuntimeError, match=r"within .*cached\(\) a"):
        step(expected, BATCH)
    if compile is False:
        within = tk.make_train_step(model, loss_within, config, OPTIMIZER, compile=False)
        torch.testing.assert_close(within(state, BATCH)[0], expected)
    plain = nn.Linear(6, 3)
    state = tk.init_state(plain, CONFIG, OPTIMIZER)
    with nn.utils.parametrize.cached():
        tk.make_train_step(plain, mse, CONFIG, OPTIMIZER, compile=False)(state, BATCH)


class Views(nn.Module):
    """Has buffers that are views of one memory, of which it may write to one."""

    def __init__(self, second: slice, write: bool = True) -> None:
        super().__init__()
        self.layer, self.writes = nn.Linear(8, 8), write
        together = torch.zeros(6, 2).t()
        self.register_buffer("first", together[:, ::2])
        self.register_buffer("second", together[:, second])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        first: Any = self.first
        if self.writes:
            first += y.detach().mean()
        return y + first.mean()


def _step(model: nn.Module) -> None:
    config, optimizer = tk.TopKastConfig(0.5), tk.sgd(0.1)
    state = tk.init_state(model, config, optimizer)
    train_step = tk.make_train_step(
        model, lambda apply, x: apply(x).square().mean(), config, optimizer, compile=False
    )
    train_step(state, torch.randn(4, 8))


def test_buffers_that_share_memory_with_one_that_is_written_to_are_named() -> None:
    _step(Views(slice(1, None, 2)))
    _step(Views(slice(0, 2), write=False))
    told = "'first' and 'second' of the model are views of one memory, and 'first' changes"
    with pytest.raises(ValueError, match=told):
        _step(Views(slice(0, 2)))


def test_a_buffer_that_is_a_view_of_a_trained_weight_is_named() -> None:
    model = nn.Linear(8, 8)
    model.register_buffer("row", model.weight.detach()[3])
    with pytest.raises(ValueError, match="'weight' and 'row' of the model are views of one memory"):
        _step(model)


class Assigning(nn.Module):
    """Assigns a buffer that goes by two names."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer, self.name = nn.Linear(8, 8), name
        self.register_buffer("first", torch.zeros(8))
        self.register_buffer("second", self.get_buffer("first"))

    def forward(self, x: Tensor) -> Tensor:
        setattr(self, self.name, getattr(self, self.name) + 1)
        y: Tensor = self.layer(x)
        return y + getattr(self, self.name)


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_tied_buffer_that_is_assigned_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"in the place of one of \[\('second', 'first'\)\]"):
        _step(Assigning(name))
