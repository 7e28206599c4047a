"""The main demo: the split, the choice of the epoch, the numbers it reports."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import random_split

import topkast_func as tk
from tests.eager import eager_step
from topkast_func import demo
from topkast_func.data import BostonHousing

CONFIG = tk.TopKastConfig(
    forward_sparsity=0.7,
    backward_sparsity=0.5,
    refresh_every=10,
    penalty_weight=0.1,
    method=demo.METHOD,
)
EPOCHS = 7


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "make_train_step", eager_step)


def _run(epochs: int = EPOCHS, seed: int = 42, name: str = "boston") -> demo.Run:
    return demo.train(name, CONFIG, epochs, seed, "test")


@pytest.fixture(scope="module")
def run() -> demo.Run:
    """One run, for tests that only read it; its last epoch is not its best."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "make_train_step", eager_step)
        return _run()


def _parts() -> list[tuple[Tensor, Tensor]]:
    """Training, validation and test rows of Boston as the demo splits them."""
    generator = torch.Generator().manual_seed(demo.SPLIT_SEED)
    parts = random_split(BostonHousing(standardize=True), (0.7, 0.2, 0.1), generator)
    return [part[:] for part in parts]


def _mean_squared_error(alpha: dict[str, Tensor], rows: tuple[Tensor, Tensor]) -> float:
    """The network of the demo written out: two hidden layers with a ReLU each."""
    features, target = rows
    hidden = (features @ alpha["0.weight"].T + alpha["0.bias"]).relu()
    hidden = (hidden @ alpha["2.weight"].T + alpha["2.bias"]).relu()
    output = (hidden @ alpha["4.weight"].T + alpha["4.bias"]).squeeze(1)
    return float((output - target).square().mean())


def test_there_is_a_job_for_each_data_set() -> None:
    assert set(demo.JOBS) == {"boston", "synthetic"}
    assert torch.equal(demo.JOBS["boston"]()[:][0], BostonHousing(standardize=True).features)
    assert demo.JOBS["synthetic"]()[:][0].shape == (1024, 2)


def test_the_run_reports_a_loss_for_each_epoch(run: demo.Run) -> None:
    assert len(run.train_losses) == len(run.validation_losses) == EPOCHS
    assert run.train_losses[-1] < 0.2 * run.train_losses[0]
    assert run.times.training > 0.0
    assert run.times.compilation == 0.0
    assert not run.interrupted


def test_the_state_is_that_of_the_lowest_validation_loss(run: demo.Run) -> None:
    lowest = min(run.validation_losses)
    assert run.validation_losses[-1] > lowest
    assert run.best_epoch == run.validation_losses.index(lowest)
    alpha = tk.forward_params(run.state)
    _, validation, _ = _parts()
    assert_close(_mean_squared_error(alpha, validation), lowest, rtol=1e-5, atol=0)
    steps_per_epoch = len(_parts()[0][1]) // demo.BATCH_SIZE
    assert int(run.state.step) == (run.best_epoch + 1) * steps_per_epoch


def test_the_test_error_is_that_of_the_forward_weights_on_the_held_out_rows(run: demo.Run) -> None:
    training, _, test = _parts()
    assert len(test[1]) == 50
    error = _mean_squared_error(tk.forward_params(run.state), test)
    assert_close(run.test.mean, error, rtol=1e-5, atol=0)
    dense_error = _mean_squared_error(tk.dense_params(run.state), test)
    assert abs(dense_error - run.test.mean) > 1e-3
    squares = (test[1] - training[1].mean()).square().double()
    assert_close(run.mean.mean, float(squares.mean()), rtol=1e-5, atol=0)
    spread = float(squares.var() / len(squares)) ** 0.5
    assert_close(run.mean.spread, spread, rtol=1e-5, atol=0)
    assert run.rows == (355, 101, 50)


def test_the_validation_error_is_the_lowest_loss(run: demo.Run) -> None:
    assert run.validation.mean == min(run.validation_losses)
    assert 0.0 < run.validation.spread < run.validation.mean


def _interrupting(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Press Ctrl-C in a step."""
    real = demo._mean_squared_error
    calls = itertools.count(-2)  # the first two are trials of the forward pass

    def loss(apply: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        if next(calls) == at:
            raise KeyboardInterrupt
        return real(apply, batch)

    monkeypatch.setattr(demo, "_mean_squared_error", loss)


def test_ctrl_c_leaves_the_run_as_far_as_it_came(
    run: demo.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_per_epoch = len(_parts()[0][1]) // demo.BATCH_SIZE
    _interrupting(monkeypatch, 2 * steps_per_epoch + 1)
    broken = _run()
    assert broken.interrupted
    assert broken.train_losses == run.train_losses[:2]
    assert broken.validation_losses == run.validation_losses[:2]
    assert broken.best_epoch == 1
    assert int(broken.state.step) == 2 * steps_per_epoch


def test_ctrl_c_in_the_first_epoch_leaves_the_last_whole_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _interrupting(monkeypatch, 3)
    broken = _run()
    assert (broken.best_epoch, broken.train_losses, int(broken.state.step)) == (None, [], 3)
    assert broken.test.mean > 0.0


@pytest.mark.parametrize("method", demo.METHODS)
def test_every_method_of_the_command_line_trains(method: str) -> None:
    config = replace(CONFIG, method=demo.METHODS[method])
    run = demo.train("boston", config, 3, 42, "test")
    assert run.train_losses[-1] < 0.8 * run.train_losses[0]


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    first, again, other = _run(2), _run(2), _run(2, seed=1)
    assert first[1:8] == again[1:8]
    assert torch.equal(
        tk.dense_params(first.state)["2.weight"], tk.dense_params(again.state)["2.weight"]
    )
    assert first.train_losses != other.train_losses
    assert first.mean == other.mean


def test_the_seed_sets_the_order_of_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    network = demo._network
    monkeypatch.setattr(demo, "_network", lambda features, seed: network(features, 0))
    first, again, other = _run(1, seed=1), _run(1, seed=1), _run(1, seed=2)
    assert first.train_losses == again.train_losses != other.train_losses


def test_the_seed_sets_the_weights() -> None:
    first, again, other = (demo._network(13, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_the_run_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    _run(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_state_can_be_trained_further_with_the_configuration(run: demo.Run) -> None:
    state = run.state
    assert list(tk.masks_of(state)) == ["0.weight", "2.weight", "4.weight"]
    assert int(tk.refresh(state, CONFIG).step) == int(state.step)


def test_the_synthetic_job_approaches_the_variance_of_its_noise() -> None:
    """The noise is uniform in [0, 1): variance 1/12; the mean alone leaves more."""
    run = _run(8, name="synthetic")
    assert 0.9 / 12 < run.test.mean < 1.35 / 12 < run.mean.mean


def test_tied_epochs_agree_on_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate of 0 all epochs tie: the first is reported, and its state."""
    monkeypatch.setattr(demo, "sgd", lambda lr, momentum: tk.sgd(lr=0.0))
    run = _run(3)
    assert len(set(run.validation_losses)) == 1
    assert run.best_epoch == 0
    steps_per_epoch = len(_parts()[0][1]) // demo.BATCH_SIZE
    assert int(run.state.step) == (run.best_epoch + 1) * steps_per_epoch
