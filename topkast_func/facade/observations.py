"""Parts of a data set, and its features and targets as a network takes them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import pairwise
from math import isclose
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    random_split,
)

from topkast_func.checks import check_number


def data_set(name: str, data: Any) -> "Dataset[Any]":
    """Return data as a data set.

    Args:
        name: What they are called in the error.
        data: A map-style data set, or a pair (features, target) of tensors of n entries each.

    Returns:
        The data set that was given, or one of n pairs.

    Raises:
        TypeError: They are neither.
        ValueError: They are missing, or the pair is not of as many features as targets.
    """
    if data is None:
        raise ValueError(f"{name} is missing: pass a data set of pairs (features, target)")
    if isinstance(data, tuple | list) and data and isinstance(data[0], Tensor | np.ndarray):
        return TensorDataset(*_pair(name, data))
    mapped = isinstance(data, Sized) and hasattr(type(data), "__getitem__")
    named = isinstance(data, Mapping) and 0 not in data
    if not mapped or named or isinstance(data, Tensor | np.ndarray | IterableDataset):
        way = ": pass its dataset" if isinstance(data, DataLoader) else ""
        raise TypeError(
            f"{name} must be a map-style data set of pairs (features, target), or one such pair "
            f"of tensors, got {type(data).__name__}{way}"
        )
    return data  # type: ignore[no-any-return]


def _pair(name: str, parts: Sequence[Any]) -> Sequence[Tensor]:
    if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(f"{name} must be a pair (features, target) of tensors, got {_kinds(parts)}")
    shapes = [tuple(part.shape) for part in parts]
    if not all(shapes) or shapes[0][0] != shapes[1][0]:
        raise ValueError(f"{name} must be as many features as targets, got tensors of {shapes}")
    return parts


def _kinds(parts: Any) -> str:
    """Name the types of the first parts, or that of what has none."""
    several = isinstance(parts, tuple | list)
    return short([type(part) for part in parts[:7]] if several else type(parts))


def pairs(name: str, batches: "DataLoader[Any]") -> Iterator[tuple[Tensor, Tensor]]:
    """Return the features and the target of every batch.

    Args:
        name: What the data are called in the error.
        batches: What gives them.

    Yields:
        Features [b, ...] and target [b, ...].

    Raises:
        TypeError: A batch is no pair of tensors.
    """
    for batch in batches:
        two = isinstance(batch, tuple | list) and len(batch) == 2
        if not two or not all(isinstance(part, Tensor) for part in batch):
            raise TypeError(
                f"{name} must be of pairs (features, target) of tensors or numbers, and a batch of "
                f"them is {_kinds(batch)}"
            )
        yield batch[0], batch[1]


def split(
    data: "Dataset[Any]", fractions: Sequence[float], generator: torch.Generator
) -> "list[Subset[Any]]":
    """Draw the parts to train, validate and test on.

    Args:
        data: A map-style data set of n observations.
        fractions: Two or three fractions that sum to 1; the third may be left out for 0.
        generator: What draws.

    Returns:
        Three parts, n observations together.

    Raises:
        TypeError: A fraction is no number, or there is no sequence of them.
        ValueError: The fractions do not sum to 1, or leave no training data.
    """
    n: int = len(data)  # type: ignore[arg-type]
    parts = random_split(data, _counts(fractions, n), generator)
    if not len(parts[0]):
        raise ValueError(
            f"train_val_test_split={fractions} of {n} observations leaves none to train on"
        )
    return parts


def _counts(fractions: Sequence[float], n: int) -> list[int]:
    """Round the bounds between the parts of ``n``, so that the parts sum to ``n``."""
    if not isinstance(fractions, Iterable):
        raise TypeError(
            f"train_val_test_split must be 2 or 3 fractions of sum 1, got {fractions!r}"
        )
    shares = [check_number("train_val_test_split", part, 0.0) for part in fractions]
    if len(shares) not in (2, 3) or not isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"train_val_test_split must be 2 or 3 fractions of sum 1, got {fractions!r}"
        )
    bounds = [0, round(n * shares[0]), min(n, round(n * sum(shares[:2]))), n]
    return [high - low for low, high in pairwise(bounds)]


def features_for(net: nn.Module, features: Tensor, device: torch.device) -> Tensor:
    """Return features on a device, floating ones in the dtype of the network."""
    features = features.to(device)
    if not features.is_floating_point():
        return features
    dtypes = (p.dtype for p in net.parameters() if p.is_floating_point())
    return features.to(next(dtypes, features.dtype))


def target_for(y_hat: Any, target: Tensor, device: torch.device) -> Tensor:
    """Return a target on a device, in shape and dtype of an output that has as many entries."""
    target = target.to(device)
    if isinstance(y_hat, Tensor) and target.numel() == y_hat.numel():
        return target.reshape(y_hat.shape).to(y_hat.dtype)
    return target


def mean_of(
    measure: Callable[[Any, Any], Any], data: "Dataset[Any]", batch_size: int, name: str
) -> float:
    """Return the mean of what is measured of batches, each weighed by its size; NaN of none."""
    total, n = 0.0, 0
    own = torch.Generator("cpu")  # a loader draws a seed, of torch's own generator if it has none
    for features, target in pairs(name, DataLoader(data, batch_size, generator=own)):
        total += float(measure(features, target)) * len(target)
        n += len(target)
    return total / n if n else float("nan")
