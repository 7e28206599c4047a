"""The tasks: a network, its data, a loss and a score."""

import gzip
import math
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence.networks import ALPHABET, cnn, decoder, mlp

Batch: TypeAlias = tuple[Tensor, Tensor]
Apply: TypeAlias = Callable[..., Any]
Build: TypeAlias = Callable[[float | None], nn.Module]

FASHION_MNIST, HELD_OUT = Path("/usr/share/datasets/fashion-mnist"), 6000
"""Its IDX files, and how many training images are held out for tuning."""

TEXT, SPLIT_SEED = Path("runs") / "kjv.txt", 0
LENGTH, SHARES, SCORED_WINDOWS = 64, (0.9, 0.05), 800
"""Characters of a window; shares of the text to train on and to tune on, the rest for the test."""


class Task(NamedTuple):
    """What is to be learnt."""

    network: Build  # ``network(parameters)``; None for the size that is made sparse
    steps: int
    batches: Callable[[bool, int], Iterator[Batch]]  # ``batches(validate, seed)``, without end
    score: Callable[[Apply, bool], float]  # ``score(apply, validate)`` of a trained network
    title: str
    unit: str  # of the score
    sign: int  # 1 where a higher score is better, −1 where a lower one is
    sample: Tensor  # one input, to count operations by
    warm_up: int = 1  # steps over which the learning rate rises
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    momentum: float | None = None  # of SGD, where that takes Adam's place


def loss_fn(apply: Apply, batch: Batch) -> Tensor:
    """Return the cross entropy of a batch, in nats."""
    return functional.cross_entropy(apply(batch[0]).flatten(0, -2), batch[1].flatten())


def idx(name: str, folder: Path = FASHION_MNIST) -> Tensor:
    """Read an IDX file: two zeros, 8 for bytes, how many axes, their sizes (big endian), bytes."""
    path = folder / f"{name}-ubyte.gz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: 'apt-get install dataset-fashion-mnist'")
    content = gzip.decompress(path.read_bytes())
    start = 4 + 4 * content[3]
    sizes = np.frombuffer(content[4:start], ">u4")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy())


def bible(path: Path = TEXT) -> str:
    """Read the King James Bible."""
    if not path.is_file():
        how = f"apt-get install bible-kjv && bible -f gen1:1-rev22:21 > {path}"
        raise FileNotFoundError(f"{path} is not there: '{how}'")
    return path.read_text(encoding="utf-8")


def source() -> str:
    """Read the modules of Python's standard library that are in no package, in shuffled order."""
    found = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return "\n".join(found[place].read_text(encoding="utf-8") for place in order)


def codes(text: str) -> Tensor:
    """Return a text as int64: each character by its place among those that are told apart, sorted.

    These are the most frequent of an alphabet; the rest have the last code of it.
    """
    told = sorted(character for character, _ in Counter(text).most_common(ALPHABET - 1))
    places = {character: place for place, character in enumerate(told)}
    return torch.tensor([places.get(character, ALPHABET - 1) for character in text])


def windows(codes: Tensor, count: int, generator: torch.Generator) -> Batch:
    """Draw windows of a text at random, [count, length], and the characters that come next."""
    starts = torch.randint(len(codes) - LENGTH, (count,), generator=generator)
    drawn = codes[starts[:, None] + torch.arange(LENGTH + 1)]
    return drawn[:, :-1], drawn[:, 1:]


def shuffled(data: Batch, seed: int) -> Iterator[Batch]:
    """Yield batches of 128 without end, shuffled anew each time through."""
    inputs, targets = data
    order = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randperm(len(inputs), generator=order)
        for chosen in torch.split(rows, 128)[: len(rows) // 128]:
            yield inputs[chosen], targets[chosen]


@cache
def _images(shape: tuple[int, ...], validate: bool) -> tuple[Batch, Batch]:
    """Return images to train on and images to score, standardised over all images and places."""
    train, test = (idx(f"{part}-images-idx3").float() / 255 for part in ("train", "t10k"))
    labels, tested = (idx(f"{part}-labels-idx1").long() for part in ("train", "t10k"))
    mean, deviation = train.mean(), train.std()
    inputs, scored = (((part - mean) / deviation).reshape(-1, *shape) for part in (train, test))
    if not validate:
        return (inputs, labels), (scored, tested)
    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held, rest = rows[:HELD_OUT], rows[HELD_OUT:]
    return (inputs[rest], labels[rest]), (inputs[held], labels[held])


def _image_task(title: str, network: Build, shape: tuple[int, ...], steps: int) -> Task:
    def batches(validate: bool, seed: int) -> Iterator[Batch]:
        return shuffled(_images(shape, validate)[0], seed)

    def score(apply: Apply, validate: bool) -> float:
        inputs, labels = _images(shape, validate)[1]
        found = torch.cat([apply(part).argmax(1) for part in torch.split(inputs, 1000)])
        return 100 * float((found == labels).double().mean())

    sample = torch.zeros(1, *shape)
    return Task(network, steps, batches, score, title, "accuracy in %", 1, sample)


@cache
def _text(read: Callable[[], str]) -> tuple[Tensor, ...]:
    """Return the parts of a text to train on, to tune on and to test on, in its order."""
    text = codes(read())
    sizes = [int(share * len(text)) for share in SHARES]
    return torch.split(text, [*sizes, len(text) - sum(sizes)])


def _text_task(title: str, width: int, steps: int, read: Callable[[], str]) -> Task:
    def batches(validate: bool, seed: int) -> Iterator[Batch]:
        order = torch.Generator().manual_seed(seed)
        while True:
            yield windows(_text(read)[0], 8, order)

    def score(apply: Apply, validate: bool) -> float:
        order = torch.Generator().manual_seed(SPLIT_SEED)
        drawn = windows(_text(read)[1 if validate else 2], SCORED_WINDOWS, order)
        parts = zip(*(torch.split(side, 50) for side in drawn), strict=True)
        return float(torch.stack([loss_fn(apply, part) for part in parts]).mean()) / math.log(2)

    sample, unit = torch.zeros(1, LENGTH, dtype=torch.int64), "bits per character (lower is better)"
    network = partial(decoder, width, 4)
    return Task(network, steps, batches, score, title, unit, -1, sample, 100, (0.9, 0.95))


_ADAM = {
    "mlp": _image_task("MLP on Fashion-MNIST", mlp, (784,), 5600),
    "cnn": _image_task("small CNN on Fashion-MNIST", cnn, (1, 28, 28), 2000),
    "text": _text_task("decoder on the King James Bible", 256, 2400, bible),
    "source": _text_task("decoder on Python's source", 128, 4800, source),
}
_SGD = {
    f"{name}_sgd": task._replace(title=f"{task.title}, SGD", momentum=0.9)
    for name, task in list(_ADAM.items())[:2]
}
TASKS = {**_ADAM, **_SGD}
