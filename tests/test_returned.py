"""What an optimiser of one's own returns: its start, and an update."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topkast_func as tk

CONFIG = tk.TopKastConfig(forward_sparsity=0.7, backward_sparsity=0.4)
BATCH = (torch.ones(4, 6), torch.zeros(4, 3))
AOT = {"backend": "aot_eager"}
compiled_or_not = pytest.mark.parametrize("compile", [False, AOT], ids=["eager", "compiled"])


def mse(apply: Any, batch: Any) -> Tensor:
    return nn.functional.mse_loss(apply(batch[0]), batch[1])


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def nothing(params: Any) -> tk.OptimizerState:
    return tk.OptimizerState(zero(), {})


def own(update: Any, init: Callable[[Any], Any] = nothing) -> tk.Optimizer:
    return tk.Optimizer(init, update, lambda step: torch.tensor(0.1), elementwise=True, name="own")


def down(grads: Any, lr: Any) -> dict[str, Tensor]:
    return {name: -lr * grad for name, grad in grads.items()}


def descend(grads: Any, state: Any, params: Any, lr: Any) -> Any:
    return down(grads, lr), tk.OptimizerState(state.step + 1, state.slots)


def first_step(optimizer: tk.Optimizer, compile: Any) -> tuple[tk.TrainState, tk.TrainState]:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    state = tk.init_state(model, CONFIG, optimizer)
    return state, tk.make_train_step(model, mse, CONFIG, optimizer, compile=compile)(state, BATCH)[
        0
    ]


MADE: Any = tk.OptimizerState
BAD_STARTS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "no state": (lambda params: {}, TypeError, "an OptimizerState, got dict"),
    "no tensor": (lambda params: MADE(0, {}), TypeError, "step is an int64 tensor"),
    "a float": (
        lambda params: tk.OptimizerState(torch.zeros(()), {}),
        TypeError,
        "step is an int64 tensor",
    ),
    "a list": (
        lambda params: MADE(zero(), {"m": [*params.values()]}),
        TypeError,
        "slots 'm' are tensors by the names of parameters",
    ),
    "pairs": (
        lambda params: MADE(zero(), {"m": {n: (p, p) for n, p in params.items()}}),
        TypeError,
        "slots 'm' are tensors by the names of parameters",
    ),
    "a row": (lambda params: MADE(zero()[None], {}), TypeError, "int64 tensor, 0-d"),
    "no slots": (lambda params: MADE(zero(), [1]), TypeError, "slots must map names to trees of"),
    "half a name": (lambda params: MADE(zero(), {"\udc80": {}}), ValueError, r"name '\\udc80'"),
    "on meta": (
        lambda params: MADE(zero(), {"m": {n: p.to("meta") for n, p in params.items()}}),
        ValueError,
        r"with values: slots 'm' of \['weight', 'bias'\] are on the meta device",
    ),
    "of all": (
        lambda params: tk.OptimizerState(zero(), {"m": {"all": torch.zeros(())}}),
        ValueError,
        r"slots 'm' are of parameters, got \['all'\]",
    ),
}


@pytest.mark.parametrize("case", BAD_STARTS.values(), ids=BAD_STARTS.keys())
def test_a_start_that_no_state_can_hold_is_refused(case: Any) -> None:
    init, error, message = case
    with pytest.raises(error, match=message):
        tk.init_state(nn.Linear(6, 3), CONFIG, own(descend, init))


def after(state: Any) -> tk.OptimizerState:
    return tk.OptimizerState(state.step + 1, state.slots)


BAD_UPDATES: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing": (lambda g, s, p, lr: None, TypeError, r"must return \(updates, OptimizerState\)"),
    "updates alone": (lambda g, s, p, lr: down(g, lr), TypeError, "must return .updates, Opt"),
    "a tuple": (lambda g, s, p, lr: (down(g, lr), (s.step + 1, {})), TypeError, "OptimizerState"),
    "too few": (
        lambda g, s, p, lr: ({"weight": -lr * g["weight"]}, after(s)),
        ValueError,
        r"one for each of \['bias', 'weight'\]",
    ),
    "another shape": (
        lambda g, s, p, lr: ({n: -lr * grad.mean() for n, grad in g.items()}, after(s)),
        ValueError,
        r"a tensor for 'weight' of the shape of its values, \(11,\)",
    ),
    "floats": (
        lambda g, s, p, lr: (dict.fromkeys(g, 0.0), after(s)),
        ValueError,
        "a tensor for 'weight'",
    ),
    "complex": (
        lambda g, s, p, lr: ({n: -lr * grad * (1 + 1j) for n, grad in g.items()}, after(s)),
        ValueError,
        "a tensor for 'weight' .* and real where they are",
    ),
}


@compiled_or_not
@pytest.mark.parametrize("case", BAD_UPDATES.values(), ids=BAD_UPDATES.keys())
def test_an_update_of_another_kind_is_named(case: Any, compile: Any) -> None:
    update, error, message = case
    with pytest.raises(error, match=message):
        first_step(own(update), compile)


def ones(params: Any) -> tk.OptimizerState:
    return tk.OptimizerState(zero(), {"m": {n: torch.ones_like(p) for n, p in params.items()}})


BAD_SLOTS: dict[str, tuple[Any, str]] = {
    "lost": (lambda slots: {}, r"slots are \[\], those before it are \['m'\]"),
    "some": (lambda slots: {"m": {"bias": slots["m"]["bias"]}}, r"'m' are of \['bias'\], those"),
    "more": (lambda slots: {**slots, "n": {}}, r"slots are \['m', 'n'\]"),
    "another shape": (
        lambda slots: {"m": {n: slot[:2] for n, slot in slots["m"].items()}},
        r"slot 'm' of 'weight' has shape \(2,\)",
    ),
    "another dtype": (
        lambda slots: {"m": {n: slot.double() for n, slot in slots["m"].items()}},
        "torch.float64, those before it",
    ),
}


@compiled_or_not
@pytest.mark.parametrize("case", BAD_SLOTS.values(), ids=BAD_SLOTS.keys())
def test_slots_that_are_others_after_an_update_are_named_at_once(case: Any, compile: Any) -> None:
    change, message = case

    def update(grads: Any, state: Any, params: Any, lr: Any) -> Any:
        return down(grads, lr), tk.OptimizerState(state.step + 1, change(state.slots))

    with pytest.raises(ValueError, match=f"update of own must keep what it remembers: .*{message}"):
        first_step(own(update, ones), compile)


@pytest.mark.parametrize(
    ("rate", "error", "message"),
    [
        (None, TypeError, "lr must be a number"),
        ("fast", TypeError, "lr must be a number"),
        (torch.ones(2), ValueError, r"lr must be a 0-d tensor, got shape \(2,\)"),
        (torch.tensor(1j), TypeError, "lr must be a real number, got a tensor of torch.complex64"),
        (torch.tensor(float("nan")), ValueError, "lr must be in"),
        (-0.1, ValueError, "lr must be in"),
    ],
    ids=str,
)
def test_a_learning_rate_that_is_none_is_named(rate: Any, error: Any, message: str) -> None:
    optimizer = tk.Optimizer(nothing, descend, lambda step: rate, elementwise=True)
    with pytest.raises(error, match=message):
        first_step(optimizer, False)


def test_a_learning_rate_may_be_a_number() -> None:
    rates: Any = (tenth, lambda step: 0.1)
    made = (tk.Optimizer(nothing, descend, rate, elementwise=True) for rate in rates)
    (_, one), (_, other) = (first_step(optimizer, False) for optimizer in made)
    assert torch.equal(one.weights.values["weight"], other.weights.values["weight"])


def tenth(step: Tensor) -> Tensor:
    return torch.tensor(0.1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((3, descend, tenth), TypeError, "init must be callable"),
        ((nothing, None, tenth), TypeError, "update must be callable"),
        ((nothing, descend, 0.1), TypeError, "learning_rate must be callable"),
    ],
)
def test_what_an_optimizer_is_made_of_are_functions(given: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        tk.Optimizer(*given)


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (0.5, TypeError)])
def test_calls_to_an_update_are_counted(every: Any, error: Any) -> None:
    with pytest.raises(error, match="every must be"):
        tk.Optimizer(nothing, descend, tenth, every=every)


def halve(grads: Any, state: Any, params: Any, lr: Any) -> Any:
    for param in params.values():
        param.mul_(0.5)
    return down(grads, lr), after(state)


@pytest.mark.parametrize(
    ("compile", "told"),
    [(False, "update of own writes to the parameters"), (AOT, "has written to the state")],
    ids=["eager", "compiled"],
)
def test_an_update_that_writes_to_what_it_is_given_is_named(compile: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        first_step(own(halve), compile)


def wide_and_still(grads: Any, state: Any, params: Any, lr: Any) -> Any:
    return {name: -lr * grad.double() for name, grad in grads.items()}, state


@compiled_or_not
def test_a_state_keeps_its_dtypes_and_counts_whatever_an_update_returns(compile: Any) -> None:
    expected = first_step(own(descend), compile)[1]
    before, state = first_step(own(wide_and_still), compile)
    assert int(state.optimizer.step) == 1
    for name, theta in tk.dense_params(state).items():
        assert theta.dtype == torch.float32
        assert torch.allclose(theta, tk.dense_params(expected)[name])
        assert not torch.equal(theta, tk.dense_params(before)[name])
