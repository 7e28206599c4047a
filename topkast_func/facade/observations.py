"""Parts of a data set, and its features and targets as a network takes them."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import isclose
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, random_split

from topkast_func.checks import check_number


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
        TypeError: A fraction is no number.
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


def mean_of(measure: Callable[[Any, Any], Any], data: "Dataset[Any]", batch_size: int) -> float:
    """Return the mean of what is measured of batches, each weighed by its size; NaN of none."""
    total, n = 0.0, 0
    own = torch.Generator("cpu")  # a loader draws a seed, of torch's own generator if it has none
    for features, target in DataLoader(data, batch_size, generator=own):
        total += float(measure(features, target)) * len(target)
        n += len(target)
    return total / n if n else float("nan")
