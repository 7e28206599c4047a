"""The main job: a small regression network, trained by the functional interface."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset, random_split
from tqdm.auto import tqdm

from topkast_func.config import TopKastConfig
from topkast_func.data import BostonHousing, SyntheticDataset
from topkast_func.distributed.launched import is_first, own_rows, world
from topkast_func.methods import topkast
from topkast_func.training.optim import sgd
from topkast_func.training.state import TrainState, forward_params, init_state
from topkast_func.training.step import make_train_step

JOBS: dict[str, Callable[[], TensorDataset]] = {
    "boston": lambda: BostonHousing(standardize=True),
    "synthetic": lambda: SyntheticDataset(1024),
}
WIDTH, BATCH_SIZE, SPLIT_SEED = 128, 64, 42

METHOD = topkast("value", exchange=None)
"""The paper's form: the sets are chosen every few steps, and plain descent does not overshoot."""


class Run(NamedTuple):
    """What a training run came to.

    Attributes:
        state: The first state of lowest validation loss; the initial one if none is finite.
        best_epoch: Its epoch, from 0.
        train_losses: Mean squared error over each epoch's batches.
        validation_losses: Mean squared error on the validation part after each epoch.
        test_mse: Mean squared error of the best state on the test part.
        mean_mse: The same of predicting the mean of the training targets.
        seconds: Wall time, compilation included.
    """

    state: TrainState
    best_epoch: int
    train_losses: list[float]
    validation_losses: list[float]
    test_mse: float
    mean_mse: float
    seconds: float


def train(
    job: str, config: TopKastConfig, epochs: int, seed: int, label: str, split: int = SPLIT_SEED
) -> Run:
    """Train an MLP on 70 % of the data, choose the epoch on 20 %, test on the rest.

    Args:
        job: Key of `JOBS`.
        config: Sparsities and refresh interval.
        epochs: Passes over the data, at least 1.
        seed: Seed of the weights and the batches.
        label: Words before the progress bar.
        split: Seed of the split.

    Returns:
        The run.
    """
    start = time.perf_counter()
    chance = torch.Generator("cpu").manual_seed(split)
    parts = random_split(JOBS[job](), (0.7, 0.2, 0.1), chance)
    (features, _), validation, test = parts[0][:], parts[1][:], parts[2][:]
    model = _network(features.shape[1], seed)
    optimizer = sgd(lr=1e-3, momentum=0.9)
    state = best = init_state(model, config, optimizer, seed=seed)
    train_step = make_train_step(
        model, _mean_squared_error, config, optimizer, process_group=world()
    )
    order = torch.Generator("cpu").manual_seed(seed)
    batches = DataLoader(
        parts[0], BATCH_SIZE, True, drop_last=True, generator=order, collate_fn=own_rows
    )
    train_losses: list[float] = []
    validation_losses: list[float] = []
    best_epoch, lowest = 0, math.inf
    with tqdm(range(epochs), desc=label, unit="epoch", disable=not is_first()) as progress:
        for epoch in progress:
            losses = []
            for batch in batches:
                state, metrics = train_step(state, batch)
                losses.append(metrics.data_loss)
            train_losses.append(float(torch.stack(losses).mean()))
            validation_losses.append(_test(model, state, validation))
            if validation_losses[-1] < lowest:
                best, best_epoch, lowest = state, epoch, validation_losses[-1]
            progress.set_postfix(
                train=train_losses[-1], validation=validation_losses[-1], refresh=False
            )
    return Run(
        state=best,
        best_epoch=best_epoch,
        train_losses=train_losses,
        validation_losses=validation_losses,
        test_mse=_test(model, best, test),
        mean_mse=float((test[1] - parts[0][:][1].mean()).square().mean()),
        seconds=time.perf_counter() - start,
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


def _test(model: nn.Module, state: TrainState, batch: tuple[Tensor, Tensor]) -> float:
    apply = lambda x: functional_call(model, forward_params(state), (x,))  # noqa: E731
    return float(_mean_squared_error(apply, batch))
