"""Learning rates: what is accepted, and when it is refused."""

import math
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import topkast_func as tk
from tests.optimizers import halving
from topkast_func.training.optim.rates import RateOf

BAD: list[tuple[Any, type[Exception], str]] = [
    (math.nan, ValueError, "must be in [0.0, inf), got nan"),
    (-0.1, ValueError, "must be in [0.0, inf), got -0.1"),
    (math.inf, ValueError, "must be in [0.0, inf), got inf"),
    (torch.tensor(math.nan), ValueError, "must be in [0.0, inf), got nan"),
    (torch.tensor(-1), ValueError, "must be in [0.0, inf), got -1"),
    (torch.tensor(math.inf), ValueError, "must be in [0.0, inf), got inf"),
    (torch.ones(1), ValueError, "must be a 0-d tensor, got shape (1,)"),
    (torch.ones(2, 3), ValueError, "must be a 0-d tensor, got shape (2, 3)"),
    (torch.ones(2, device="meta"), ValueError, "must be a 0-d tensor, got shape (2,)"),
    (torch.tensor(True), TypeError, "must be a real number, got a tensor of torch.bool"),
    (torch.tensor(1j), TypeError, "must be a real number, got a tensor of torch.complex64"),
    (True, TypeError, "must be a number in [0.0, inf), got True"),
    ("0.1", TypeError, "must be a number in [0.0, inf), got '0.1'"),
    (None, TypeError, "must be a number in [0.0, inf), got None"),
]


@pytest.mark.parametrize(("rate", "error", "message"), BAD)
def test_what_a_schedule_returns_is_checked_as_numbers_are(
    rate: Any, error: type[Exception], message: str
) -> None:
    schedule = RateOf(lambda step: 0.1 if step < 3 else rate)
    assert float(schedule(torch.tensor(2))) == 0.1
    with pytest.raises(error, match=re.escape(f"lr at step 3 {message}")):
        schedule(torch.tensor(3))


@pytest.mark.parametrize(("rate", "error", "message"), BAD)
def test_what_is_given_at_once_is_checked_at_once(
    rate: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(f"lr {message}")):
        RateOf(rate)


@pytest.mark.parametrize("value", [math.nan, -0.5, math.inf])
def test_a_tensor_is_checked_at_each_step(value: float) -> None:
    lr = torch.tensor(0.5)
    rate = RateOf(lr)
    assert float(rate(torch.tensor(0))) == 0.5
    lr.fill_(value)
    with pytest.raises(
        ValueError, match=re.escape(f"lr at step 7 must be in [0.0, inf), got {value}")
    ):
        rate(torch.tensor(7))


@pytest.mark.parametrize("lr", [torch.tensor(1), torch.tensor(0.5), torch.tensor(0.0)])
def test_a_tensor_is_taken_as_it_is(lr: Tensor) -> None:
    assert RateOf(lr)(torch.tensor(0)) is lr


def test_the_value_of_a_tensor_on_a_device_is_not_waited_for() -> None:
    """A meta tensor has none that could be read."""
    lr = torch.tensor(0.5, device="meta")
    assert RateOf(lr)(torch.tensor(0)) is lr
    assert RateOf(lambda step: lr)(torch.tensor(0)).device.type == "meta"


@pytest.mark.parametrize("lr", [0.1, halving, lambda step: 0.1])
def test_a_rate_is_on_the_cpu_whatever_the_default_device(lr: Any) -> None:
    with torch.device("meta"):
        state = tk.adam(lr).init({})
        rate = RateOf(lr)(torch.zeros((), dtype=torch.int64, device="cpu"))
    assert (state.step.device.type, rate.dtype) == ("cpu", torch.float64)
    assert callable(lr) or rate.device.type == "cpu"


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])
def test_a_bad_rate_stops_a_run_before_its_step(compile: Any) -> None:
    model, config = nn.Linear(4, 2), tk.TopKastConfig(0.5, 0.25)
    optimizer = tk.sgd(lambda step: 0.1 if step < 2 else math.nan)
    mse = lambda apply, x: apply(x).square().mean()  # noqa: E731
    step = tk.make_train_step(model, mse, config, optimizer, compile=compile)
    state = tk.init_state(model, config, optimizer)
    for _ in range(2):
        state, _ = step(state, torch.ones(3, 4))
    before = {name: theta.clone() for name, theta in tk.dense_params(state).items()}
    with pytest.raises(ValueError, match=re.escape("lr at step 2 must be in [0.0, inf), got nan")):
        step(state, torch.ones(3, 4))
    assert_close(tk.dense_params(state), before, rtol=0.0, atol=0.0)


def test_rates_compare_by_what_they_are() -> None:
    lr = torch.tensor(0.1)
    groups = [
        [RateOf(0.1), RateOf(0.1)],
        [RateOf(0.2)],
        [RateOf(lr), RateOf(lr)],
        [RateOf(lr.clone())],
        [RateOf(halving), RateOf(halving), pickle.loads(pickle.dumps(RateOf(halving)))],
    ]
    for i, group in enumerate(groups):
        for j, others in enumerate(groups):
            for one in group:
                for other in others:
                    assert (one == other) == (i == j)
                    assert i != j or hash(one) == hash(other)
    assert RateOf(0.1) != 0.1


@pytest.mark.parametrize(
    ("lr", "text"), [(0.1, "0.1"), (torch.tensor(0.5), "tensor(0.5000)"), (halving, "halving")]
)
def test_a_rate_prints_as_what_was_given(lr: Any, text: str) -> None:
    assert repr(RateOf(lr)) == text


def test_a_rate_on_the_meta_device_is_named_by_the_step() -> None:
    model, config = nn.Linear(4, 3), tk.TopKastConfig()
    optimizer = tk.sgd(torch.tensor(0.1, device="meta"))
    state = tk.init_state(model, config, optimizer)
    train_step = tk.make_train_step(
        model, lambda apply, x: apply(x).sum(), config, optimizer, compile=False
    )
    with pytest.raises(ValueError, match="lr has no number: it is a tensor on the meta device"):
        train_step(state, torch.ones(2, 4))
