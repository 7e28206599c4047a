"""The tasks: a network, its data, a loss and a score."""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence.networks import cnn, decoder, mlp
from topkast_func.data import Characters, fashion_mnist, windows

Batch: TypeAlias = tuple[Tensor, Tensor]
Apply: TypeAlias = Callable[..., Any]

HELD_OUT, SPLIT_SEED = 6000, 0
"""Training images held out for tuning."""

TEXT = Path("runs") / "kjv.txt"
"""The King James Bible; `Characters` says how to get it."""

LENGTH, SHARES, SCORED_WINDOWS = 64, (0.9, 0.05), 800
"""Characters of a window; shares of the text to train on and to tune on, the rest for the test."""


class Task(NamedTuple):
    """What is to be learnt.

    Attributes:
        network: ``network(parameters)``; None for the size that is made sparse, or about how
            many parameters the network is to have.
        steps: Steps of a run.
        batches: ``batches(validate, seed)``, without end.
        score: ``score(apply, validate)`` of a trained network.
        unit: What the score is.
        sign: 1 where a higher score is better, −1 where a lower one is.
        sample: One input, to count operations by.
        warm_up: Steps over which the learning rate rises, at least 1.
        betas: Of Adam.
    """

    network: Callable[[float | None], nn.Module]
    steps: int
    batches: Callable[[bool, int], Iterator[Batch]]
    score: Callable[[Apply, bool], float]
    unit: str
    sign: int
    sample: Tensor
    warm_up: int = 1
    betas: tuple[float, float] = (0.9, 0.999)


def loss_fn(apply: Apply, batch: Batch) -> Tensor:
    """Return the cross entropy of a batch, in nats."""
    return functional.cross_entropy(apply(batch[0]).flatten(0, -2), batch[1].flatten())


@cache
def _images(shape: tuple[int, ...], validate: bool) -> tuple[Batch, Batch]:
    """Return images to train on and images to score, standardised over all images and places."""
    train, test = fashion_mnist("train"), fashion_mnist("test")
    mean, deviation = train.pixels.mean(), train.pixels.std()
    inputs, scored = (((p.pixels - mean) / deviation).reshape(-1, *shape) for p in (train, test))
    if not validate:
        return (inputs, train.labels), (scored, test.labels)
    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held, rest = rows[:HELD_OUT], rows[HELD_OUT:]
    return (inputs[rest], train.labels[rest]), (inputs[held], train.labels[held])


def _image_batches(shape: tuple[int, ...], size: int, validate: bool, seed: int) -> Iterator[Batch]:
    inputs, labels = _images(shape, validate)[0]
    order = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randperm(len(inputs), generator=order)
        for chosen in torch.split(rows, size)[: len(rows) // size]:
            yield inputs[chosen], labels[chosen]


def _accuracy(shape: tuple[int, ...], apply: Apply, validate: bool) -> float:
    inputs, labels = _images(shape, validate)[1]
    found = torch.cat([apply(part).argmax(1) for part in torch.split(inputs, 1000)])
    return 100 * float((found == labels).double().mean())


@cache
def _text() -> Characters:
    return Characters(TEXT)


def _text_batches(size: int, validate: bool, seed: int) -> Iterator[Batch]:
    order = torch.Generator().manual_seed(seed)
    while True:
        drawn = windows(_text().split(*SHARES)[0], LENGTH + 1, size, order)
        yield drawn[:, :-1], drawn[:, 1:]


def _bits_per_character(apply: Apply, validate: bool) -> float:
    codes = _text().split(*SHARES)[1 if validate else 2]
    drawn = windows(codes, LENGTH + 1, SCORED_WINDOWS, torch.Generator().manual_seed(SPLIT_SEED))
    losses = [loss_fn(apply, (part[:, :-1], part[:, 1:])) for part in torch.split(drawn, 50)]
    return float(torch.stack(losses).mean()) / math.log(2)


def _image_task(
    network: Callable[[float | None], nn.Module], shape: tuple[int, ...], steps: int
) -> Task:
    return Task(
        network,
        steps,
        partial(_image_batches, shape, 128),
        partial(_accuracy, shape),
        "test accuracy, %",
        1,
        torch.zeros(1, *shape),
    )


TASKS = {
    "mlp": _image_task(mlp, (784,), 5600),
    "cnn": _image_task(cnn, (1, 28, 28), 2000),
    "text": Task(
        decoder,
        2400,
        partial(_text_batches, 8),
        _bits_per_character,
        "bits per character",
        -1,
        torch.zeros(1, LENGTH, dtype=torch.int64),
        warm_up=100,
        betas=(0.9, 0.95),
    ),
}
