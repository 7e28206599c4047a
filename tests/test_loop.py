"""The loop with callbacks: who stops it, what is left when it breaks off, the best state."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topkast_func as tk

CONFIG = tk.TopKastConfig(0.75, 0.5, refresh_every=2)
OPTIMIZER = tk.sgd(0.1)


def start() -> tuple[tk.TrainState, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    step = tk.make_train_step(
        model, lambda apply, x: apply(x).square().mean(), CONFIG, OPTIMIZER, compile=False
    )
    return tk.init_state(model, CONFIG, OPTIMIZER), step


def batches(count: int = 6) -> Tensor:
    return torch.randn(count, 5, 4, generator=torch.Generator().manual_seed(0))


class At(tk.Callback):
    """Does something at a step."""

    def __init__(self, step: int, answer: bool | BaseException | None) -> None:
        self.step, self.answer, self.heard = step, answer, 0

    def on_step(self, state: tk.TrainState, metrics: tk.StepMetrics) -> bool | None:
        self.heard += 1
        if int(state.step) != self.step:
            return None
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def trained(*callbacks: tk.Callback, **options: bool) -> tk.TrainState:
    state, step = start()
    return tk.train(step, state, batches(), CONFIG, callbacks, **options)


def test_a_callback_stops_after_all_have_been_told() -> None:
    stops, witness = At(3, answer=True), At(0, None)
    assert int(trained(stops, witness).step) == 3
    assert stops.heard == witness.heard == 3
    assert int(trained(At(3, answer=False)).step) == 6


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("own")], ids=lambda f: repr(f))
def test_an_exception_keeps_its_kind_and_hands_back_the_state(failure: BaseException) -> None:
    with pytest.raises(type(failure)) as raised:
        trained(At(4, failure))
    assert raised.value is failure
    expected = trained(At(4, answer=True))
    kept = vars(failure)["state"]
    assert int(kept.step) == 4
    assert torch.equal(tk.dense_params(kept)["weight"], tk.dense_params(expected)["weight"])
    if hasattr(failure, "__notes__"):
        assert "the state after 4 steps" in failure.__notes__[0]


def test_a_step_that_breaks_hands_back_the_state_before_it() -> None:
    def data() -> Iterator[Tensor]:
        yield from batches(2)
        yield torch.ones(5, 3)

    state, step = start()
    with pytest.raises(ValueError, match="do not fit") as raised:
        tk.train(step, state, data(), CONFIG)
    assert int(vars(raised.value)["state"].step) == 2


def test_progress_shows_steps_loss_and_times_and_only_if_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained()
    assert capsys.readouterr() == ("", "")
    trained(progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "6/6" in err
    assert "loss=" in err
    assert err.splitlines()[-1].startswith("training 0.")
    assert err.splitlines()[-1].endswith("compilation 0.0 s, once")


def test_the_best_state_is_kept_and_saved_and_patience_ends_the_training(tmp_path: Path) -> None:
    answers = iter([3.0, math.nan, 1.0, 1.0, 2.0, 0.0])
    path = tmp_path / "best.safetensors"
    best = tk.Best(lambda state: next(answers), patience=2, path=path, config=CONFIG)
    state = trained(best)
    assert int(state.step) == 5
    assert best.values[2:] == [1.0, 1.0, 2.0]
    assert best.state is not None
    assert (best.step, best.value, int(best.state.step)) == (3, 1.0, 3)
    saved = tk.load(path, CONFIG)
    assert int(saved.step) == 3
    assert torch.equal(tk.dense_params(saved)["weight"], tk.dense_params(best.state)["weight"])


def test_it_measures_every_so_many_steps_and_without_patience_never_stops() -> None:
    best = tk.Best(lambda state: -int(state.step), every=2)
    assert int(trained(best).step) == 6
    assert best.values == [-2, -4, -6]
    assert best.step == 6


def test_gradients_that_accumulate_make_no_measure() -> None:
    model, optimizer = nn.Linear(4, 2), tk.multi_steps(tk.sgd(0.1), 2)
    step = tk.make_train_step(
        model, lambda apply, x: apply(x).square().mean(), CONFIG, optimizer, compile=False
    )
    best = tk.Best(lambda state: 0.0)
    tk.train(step, tk.init_state(model, CONFIG, optimizer), batches(), CONFIG, [best])
    assert len(best.values) == 3


def test_nothing_finite_is_no_best() -> None:
    best = tk.Best(lambda state: math.nan, patience=1)
    assert int(trained(best).step) == 1
    assert best.state is None


def test_patience_that_has_ended_ends_the_next_training_too() -> None:
    best = tk.Best(lambda state: 1.0, patience=2)
    assert [int(trained(best).step) for _ in range(2)] == [3, 1]


@pytest.mark.parametrize("option", ["every", "patience"])
def test_bad_options_of_the_best_are_refused(option: str) -> None:
    options: dict[str, Any] = {option: 0}
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        tk.Best(lambda state: 0.0, **options)


@pytest.mark.parametrize("callback", [tk.Callback, lambda state, metrics: None])
def test_callbacks_of_another_kind_are_named(callback: Any) -> None:
    with pytest.raises(TypeError, match=r"callbacks must be instances of tk.Callback, got"):
        tk.train(lambda *_: None, None, [], CONFIG, [callback])  # type: ignore[arg-type]


def test_a_callback_without_all_hooks_is_refused_at_once() -> None:
    class Logging:
        def on_step(self, state: Any, metrics: Any) -> None:
            raise AssertionError

    model, config, optimizer = nn.Linear(8, 4), tk.TopKastConfig(0.5), tk.sgd(0.1)
    state = tk.init_state(model, config, optimizer)
    train_step = tk.make_train_step(
        model, lambda apply, x: apply(x).square().mean(), config, optimizer, compile=False
    )
    with pytest.raises(TypeError, match=r"callbacks must be instances of tk\.Callback"):
        tk.train(train_step, state, torch.randn(5, 3, 8), config, [Logging()])  # type: ignore[list-item]
