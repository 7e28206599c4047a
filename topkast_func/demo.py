"""The main job: a small regression network, trained by the functional interface."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset, random_split
from tqdm import tqdm

from topkast_func import methods
from topkast_func.compiling import Times, stopwatch
from topkast_func.config import TopKastConfig
from topkast_func.data import BostonHousing, SyntheticDataset
from topkast_func.distributed.launched import is_first, own_rows, world
from topkast_func.training.best import Best
from topkast_func.training.loop import Callback
from topkast_func.training.loop import train as loop
from topkast_func.training.metrics import StepMetrics
from topkast_func.training.optim import sgd
from topkast_func.training.readout import forward_params
from topkast_func.training.start import init_state
from topkast_func.training.state import Storage, TrainState
from topkast_func.training.step import make_train_step

JOBS: dict[str, Callable[[], TensorDataset]] = {
    "boston": lambda: BostonHousing(standardize=True),
    "synthetic": lambda: SyntheticDataset(1024),
}
WIDTH, BATCH_SIZE, SPLIT_SEED, LEARNING_RATE = 128, 64, 42, 1e-3

METHOD = methods.topkast("value", exchange=None)
"""The paper's form: the sets are chosen every few steps, and plain descent does not overshoot."""

METHODS: dict[str, methods.Method] = {
    "topkast": METHOD,
    "topkast-zero": methods.topkast(),
    "random-backward": methods.random_backward(),
    "ste": methods.ste(),
    "static": methods.static(),
    "set": methods.set(),
    "rigl": methods.rigl(),
    "gmp": methods.gmp(0, 500),
    "dense": methods.dense(),
}
"""By the name that the command line has for them."""


class Error(NamedTuple):
    """Mean squared error over the rows of a part of the data.

    Attributes:
        mean: The mean.
        spread: Its standard error: standard deviation of the squared errors over √rows.
    """

    mean: float
    spread: float


class Run(NamedTuple):
    """What a training run came to, also one that was broken off.

    Attributes:
        state: The first state of lowest validation loss; the initial one if none is finite, the
            last one if none was measured.
        best_epoch: Its epoch, from 0; None if no epoch has ended with a finite loss.
        train_losses: Mean squared error over each epoch's batches.
        validation_losses: Mean squared error on the validation part after each epoch.
        validation: Error of the state on the validation part, by which it was chosen.
        test: Its error on the test part.
        mean: Error of predicting the mean of the training targets on the test part.
        rows: Rows of the training, validation and test parts.
        times: How long training and compilation took.
        interrupted: Whether Ctrl-C ended it.
        model: The network, with the weights that it began with.
    """

    state: TrainState
    best_epoch: int | None
    train_losses: list[float]
    validation_losses: list[float]
    validation: Error
    test: Error
    mean: Error
    rows: tuple[int, ...]
    times: Times
    interrupted: bool
    model: nn.Module


class _Epochs(Callback):
    """Keeps the mean loss of each epoch, and shows how far the training is."""

    def __init__(self, best: Best, epochs: int, label: str) -> None:
        self.best, self.losses = best, list[float]()
        self.bar = tqdm(total=epochs, desc=label, unit="epoch", disable=not is_first())
        self._since: list[Tensor] = []

    def on_step(self, state: TrainState, metrics: StepMetrics) -> None:
        self._since.append(metrics.data_loss)
        if len(self._since) == self.best.every:
            self.losses.append(float(torch.stack(self._since).mean()))
            self._since.clear()
            self.bar.set_postfix(
                train=self.losses[-1], validation=self.best.values[-1], refresh=False
            )
            self.bar.update()


def train(
    job: str,
    config: TopKastConfig,
    epochs: int,
    seed: int,
    label: str,
    split: int = SPLIT_SEED,
    *,
    lr: float = LEARNING_RATE,
    storage: Storage = "compact",
    compile: bool = True,
) -> Run:
    """Train an MLP on 70 % of the data, choose the epoch on 20 %, test on the rest.

    Args:
        job: Key of `JOBS`.
        config: Sparsities and refresh interval.
        epochs: Passes over the data, at least 1.
        seed: Seed of the weights and the batches.
        label: Words before the progress bar.
        split: Seed of the split.
        lr: Learning rate of descent with momentum 0.9.
        storage: See `init_state`.
        compile: See `make_train_step`.

    Returns:
        The run, as far as it came before Ctrl-C.
    """
    times = stopwatch()
    chance = torch.Generator("cpu").manual_seed(split)
    parts = random_split(JOBS[job](), (0.7, 0.2, 0.1), chance)
    (features, target), validation, test = (part[:] for part in parts)
    model, optimizer = _network(features.shape[1], seed), sgd(lr, momentum=0.9)
    order = torch.Generator("cpu").manual_seed(seed)
    batches = DataLoader(
        parts[0], BATCH_SIZE, True, drop_last=True, generator=order, collate_fn=own_rows
    )
    measure = partial(_error, model)
    best = Best(lambda state: measure(state, validation).mean, len(batches))
    state = first = init_state(model, config, optimizer, seed=seed, storage=storage)
    step = make_train_step(
        model, _mean_squared_error, config, optimizer, compile=compile, process_group=world()
    )
    seen = _Epochs(best, epochs, label)
    data = itertools.chain.from_iterable(itertools.repeat(batches, epochs))
    interrupted = False
    try:
        state = loop(step, state, data, config, [best, seen])
    except KeyboardInterrupt as stop:
        state, interrupted = vars(stop)["state"], True
    finally:
        seen.bar.close()
    chosen = best.state or (first if best.values else state)
    return Run(
        state=chosen,
        best_epoch=best.step // best.every - 1 if best.state else None,
        train_losses=seen.losses,
        validation_losses=best.values,
        validation=measure(chosen, validation),
        test=measure(chosen, test),
        mean=_spread((test[1] - target.mean()).square()),
        rows=tuple(map(len, parts)),
        times=times(),
        interrupted=interrupted,
        model=model,
    )


def _network(features: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(features, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, 1),
            nn.Flatten(0),
        )


def _mean_squared_error(apply: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> Tensor:
    features, target = batch
    return nn.functional.mse_loss(apply(features), target)


def _error(model: nn.Module, state: TrainState, batch: tuple[Tensor, Tensor]) -> Error:
    features, target = batch
    return _spread((functional_call(model, forward_params(state), features) - target).square())


def _spread(errors: Tensor) -> Error:
    return Error(float(errors.mean()), float(errors.std() / math.sqrt(len(errors))))
