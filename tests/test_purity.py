"""What the first step in each mode finds out: whether the loss sees what is trained."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

import topkast_func as tk

CONFIG = tk.TopKastConfig(forward_sparsity=0.7, backward_sparsity=0.4)
OPTIMIZER = tk.adamw(0.01)
EAGER = {"backend": "eager"}
BATCH = (torch.ones(4, 6), torch.zeros(4, 3))
compiled_or_not = pytest.mark.parametrize("compile", [False, EAGER], ids=["eager", "compiled"])

Loss = Callable[[nn.Module], Callable[[Any, Any], Tensor]]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def mse(apply: Any, batch: Any) -> Tensor:
    return nn.functional.mse_loss(apply(batch[0]), batch[1])


def without_gradients(apply: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return mse(apply, batch)


def first_step(
    model: nn.Module, loss: Any, compile: Any, storage: Any = "compact"
) -> tk.TrainState:
    state = tk.init_state(model, CONFIG, OPTIMIZER, storage=storage)
    return tk.make_train_step(model, loss, CONFIG, OPTIMIZER, compile=compile)(state, BATCH)[0]


UNSEEING: dict[str, Loss] = {
    "detached": lambda model: lambda apply, batch: mse(apply, batch).detach(),
    "constant": lambda model: lambda apply, batch: torch.tensor(1.0),
    "constant that requires a gradient": lambda model: (
        lambda apply, batch: torch.tensor(1.0, requires_grad=True)
    ),
    "no_grad": lambda model: without_gradients,
    "the module itself": lambda model: lambda apply, batch: mse(model, batch),
    "the inputs alone": lambda model: lambda apply, batch: batch[0].square().mean(),
}


@compiled_or_not
@pytest.mark.parametrize("loss", UNSEEING.values(), ids=UNSEEING.keys())
def test_a_loss_that_does_not_see_what_is_trained_is_refused(loss: Loss, compile: Any) -> None:
    model = network()
    with pytest.raises(ValueError, match=r"call the model through apply: model\(x\) has the orig"):
        first_step(model, loss(model), compile)


def test_a_pure_function_that_reads_no_weights_is_refused() -> None:
    params = {"weight": torch.randn(3, 6)}
    step = tk.make_train_step(lambda p, x: x[:, :3] * 2, mse, CONFIG, OPTIMIZER, compile=False)
    with pytest.raises(ValueError, match="does not depend on what is trained"):
        step(tk.init_state(params, CONFIG, OPTIMIZER), BATCH)


SEEING: dict[str, Loss] = {
    "some weights alone": lambda model: lambda apply, batch: apply(batch[0])[:, 0].mean(),
    "dead units": lambda model: lambda apply, batch: (apply(batch[0]) - 1e6).relu().sum(),
    "times zero": lambda model: lambda apply, batch: 0.0 * mse(apply, batch),
    "beside the module itself": lambda model: (
        lambda apply, batch: (
            mse(apply, batch) + apply(batch[0]).sub(model(batch[0]).detach()).square().mean()
        )
    ),
    "beside a derivative": lambda model: (
        lambda apply, batch: torch.func.grad(lambda x: apply(x).sum())(batch[0]).square().mean()
    ),
}


@pytest.mark.parametrize("loss", SEEING.values(), ids=SEEING.keys())
def test_a_gradient_of_zero_is_no_reason_to_refuse_a_loss(loss: Loss) -> None:
    model = network()
    assert int(first_step(model, loss(model), compile=False).step) == 1


@pytest.mark.parametrize("frozen", ["0", "2"])
def test_a_loss_behind_frozen_parts_sees_what_is_trained(frozen: str) -> None:
    model = network()
    model.get_submodule(frozen).requires_grad_(False)
    with torch.no_grad():
        assert int(first_step(model, mse, compile=False).step) == 1


def test_what_a_trial_cannot_run_is_for_the_step_to_name() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        first_step(network(), lambda apply, batch: batch[0].shape.no_such_thing, compile=False)


def test_each_mode_of_the_module_is_tried() -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if self.training else self.layer(x).detach()

    model = Teacher()
    state = tk.init_state(model, CONFIG, OPTIMIZER)
    train_step = tk.make_train_step(model, mse, CONFIG, OPTIMIZER, compile=False)
    state, _ = train_step(state, BATCH)
    model.eval()
    with pytest.raises(ValueError, match="does not depend on what is trained"):
        train_step(state, BATCH)


# What requires a gradient is what is trained, at every step.


@pytest.mark.parametrize("storage", ["compact", "dense"])
def test_a_parameter_that_is_frozen_in_mid_run_is_named(storage: Any) -> None:
    model = network()
    state = tk.init_state(model, CONFIG, OPTIMIZER, storage=storage)
    train_step = tk.make_train_step(model, mse, CONFIG, OPTIMIZER, compile=False)
    state, _ = train_step(state, BATCH)
    model.get_parameter("2.weight").requires_grad_(False)
    with pytest.raises(ValueError, match=r"'2.weight' requires no gradient, but the state trains"):
        train_step(state, BATCH)
    model.get_parameter("2.weight").requires_grad_(True)
    assert int(train_step(state, BATCH)[0].step) == 2


def test_a_parameter_that_is_unfrozen_in_mid_run_is_named() -> None:
    model = network()
    model.get_parameter("0.bias").requires_grad_(False)
    state = tk.init_state(model, CONFIG, OPTIMIZER)
    train_step = tk.make_train_step(model, mse, CONFIG, OPTIMIZER, compile=False)
    state, _ = train_step(state, BATCH)
    model.get_parameter("0.bias").requires_grad_(True)
    with pytest.raises(ValueError, match=r"'0.bias' requires a gradient, but .* freezes it"):
        train_step(state, BATCH)


def test_the_way_on_from_a_change_of_what_is_trained() -> None:
    model = network()
    state = first_step(model, mse, compile=False)
    theta = tk.dense_params(state)
    model.load_state_dict(theta, strict=False)
    model.get_parameter("2.weight").requires_grad_(False)
    after = first_step(model, mse, compile=False)
    assert torch.equal(after.frozen["2.weight"], theta["2.weight"])
    assert not torch.equal(tk.dense_params(after)["0.weight"], theta["0.weight"])


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model.get_submodule("1").weight = model.get_submodule("0").weight
    assert int(first_step(model, mse, compile=False).step) == 1


def stack(tie: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    if tie:
        model.get_submodule("1").weight = model.get_submodule("0").weight
    return model


@pytest.mark.parametrize("tie", [False, True])
def test_ties_that_change_in_mid_run_are_named(tie: bool) -> None:
    model = stack(tie)
    state = tk.init_state(model, CONFIG, OPTIMIZER)
    train_step = tk.make_train_step(model, mse, CONFIG, OPTIMIZER, compile=False)
    state, _ = train_step(state, BATCH)
    first, second = model.get_submodule("0"), model.get_submodule("1")
    other, own = stack(tie=False).get_submodule("1").weight, second.weight
    second.weight = other if tie else first.weight
    with pytest.raises(ValueError, match=r"tied are no longer .*'1.weight': '0.weight'"):
        train_step(state, BATCH)
    second.weight = own
    assert int(train_step(state, BATCH)[0].step) == 2


def replace_layer(model: nn.Module) -> Callable[[], None]:
    own: Any = model.get_submodule("2")
    model.set_submodule("2", nn.Linear(8, 3))
    return lambda: model.set_submodule("2", own)


def append_layer(model: Any) -> Callable[[], None]:
    model.append(nn.Linear(3, 3))
    return lambda: model.__delitem__(3)


def add_parameter(model: nn.Module) -> Callable[[], None]:
    model.register_parameter("scale", nn.Parameter(torch.ones(3)))
    return lambda: delattr(model, "scale")


def add_buffer(model: nn.Module) -> Callable[[], None]:
    model.register_buffer("calls", torch.zeros(()))
    return lambda: delattr(model, "calls")


def drop_bias(model: nn.Module) -> Callable[[], None]:
    layer: Any = model.get_submodule("0")
    bias = layer.bias
    layer.bias = None
    return lambda: setattr(layer, "bias", bias)


def widen(model: nn.Module) -> Callable[[], None]:
    model.double()

    def narrow() -> None:
        model.float()

    return narrow


def hook(model: nn.Module) -> Callable[[], None]:
    bias: Any = model.get_parameter("0.bias")
    remove: Callable[[], None] = bias.register_hook(lambda _: None).remove
    return remove


CHANGES = {
    replace_layer: "consists of other modules, 4, than when make_train_step was called, 4",
    append_layer: "consists of other modules, 5, than when make_train_step was called, 4",
    add_parameter: r"of another model: of the parameters missing \['scale'\], unknown \[\]",
    add_buffer: r"of another model: of the buffers missing \['calls'\], unknown \[\]",
    drop_bias: r"of another model: of the parameters missing \[\], unknown \['0.bias'\]",
    widen: "'0.weight' has dtype torch.float32, the model torch.float64",
    hook: "'0.bias' has a hook on its gradient",
}


@compiled_or_not
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_module_that_becomes_another_in_mid_run_is_named(change: Any, compile: Any) -> None:
    model = network()
    state = tk.init_state(model, CONFIG, OPTIMIZER)
    train_step = tk.make_train_step(model, mse, CONFIG, OPTIMIZER, compile=compile)
    state, _ = train_step(state, BATCH)
    undo = change(model)
    with pytest.raises(ValueError, match=CHANGES[change]):
        train_step(state, BATCH)
    undo()
    assert int(train_step(state, BATCH)[0].step) == 2


@compiled_or_not
def test_a_hook_on_the_forward_pass_is_called_from_when_it_is_there(compile: Any) -> None:
    model = network()
    state = tk.init_state(model, CONFIG, OPTIMIZER)
    train_step = tk.make_train_step(model, mse, CONFIG, OPTIMIZER, compile=compile)
    before = train_step(state, BATCH)[1].data_loss
    handle = model.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert torch.allclose(train_step(state, BATCH)[1].data_loss, 4 * before)
    handle.remove()
    assert torch.equal(train_step(state, BATCH)[1].data_loss, before)


class LossModule(nn.Module):
    """A loss function that is a module."""

    def forward(self, apply: Any, batch: Any) -> Tensor:
        return mse(apply, batch)


def on_all_after(loss_fn: nn.Module) -> Any:
    doubled = lambda module, inputs, y: 2 * y if isinstance(module, nn.Sequential) else None  # noqa: E731
    return torch_module.register_module_forward_hook(doubled)


def on_all_before(loss_fn: nn.Module) -> Any:
    negated = lambda module, inputs: -inputs[0] if isinstance(module, nn.Sequential) else None  # noqa: E731
    return torch_module.register_module_forward_pre_hook(negated)


def on_the_loss(loss_fn: nn.Module) -> Any:
    return loss_fn.register_forward_hook(lambda module, inputs, loss: 3 * loss)


@compiled_or_not
@pytest.mark.parametrize("add", [on_all_after, on_all_before, on_the_loss])
def test_a_hook_that_is_not_of_the_model_is_called_as_long_as_it_is_there(
    add: Any, compile: Any
) -> None:
    loss_fn = LossModule()
    model = network()
    state = tk.init_state(model, CONFIG, OPTIMIZER)
    train_step = tk.make_train_step(model, loss_fn, CONFIG, OPTIMIZER, compile=compile)
    before = train_step(state, BATCH)[1].data_loss
    handle = add(loss_fn)
    try:
        hooked = train_step(state, BATCH)[1].data_loss
        anew = tk.make_train_step(model, loss_fn, CONFIG, OPTIMIZER, compile=False)
        torch.testing.assert_close(hooked, anew(state, BATCH)[1].data_loss)
        assert not torch.allclose(hooked, before)
    finally:
        handle.remove()
    assert torch.equal(train_step(state, BATCH)[1].data_loss, before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", torch.tensor(3.0)),
        ("step", torch.tensor(-3)),
        ("seed", torch.tensor(7.0)),
    ],
)
def test_counters_that_do_not_count_are_named(field: str, value: Any) -> None:
    model = network()
    state = tk.init_state(model, CONFIG, OPTIMIZER)._replace(**{field: value})
    train_step = tk.make_train_step(model, mse, CONFIG, OPTIMIZER, compile=False)
    for use in (tk.dense_params, lambda state: train_step(state, BATCH)):
        with pytest.raises(ValueError, match=f"^state.{field} must be an int64 tensor of at least"):
            use(state)


class Recomputed(nn.Module):
    """A network that keeps no activations of its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.first, x, use_reentrant=False)
        out: Tensor = self.last(hidden)
        return out


@compiled_or_not
def test_activation_checkpointing_is_refused_with_the_way_on(compile: Any) -> None:
    with pytest.raises(RuntimeError, match=r"torch\.utils\.checkpoint.*take it out.*tk\.sparsify"):
        first_step(Recomputed(), mse, compile)
