"""Numbers that count, such as steps and seeds, are whole and not negative, wherever given."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import topkast_func as tk
from topkast_func.data import SyntheticDataset
from topkast_func.testing import check_counts

MODEL = nn.Linear(8, 4)
PARAMS = {name: p.detach() for name, p in MODEL.named_parameters()}
FIXED = tk.TopKastConfig(0.5, 0.25)
DENSE = tk.TopKastConfig(0.5, 0.25, method=tk.dense())
MASKS = tk.compute_masks(PARAMS, FIXED)
X = torch.ones(2, 8)


def loss(apply: Any, batch: Any) -> Any:
    return apply(batch).square().mean()


def sparse() -> nn.Module:
    model = nn.Linear(8, 4)
    tk.sparsify(model, FIXED)
    return model


def state(**seeds: Any) -> tk.TrainState:
    return tk.init_state(MODEL, FIXED, tk.sgd(0.1), **seeds)


COUNTERS: dict[str, Callable[[Any], Any]] = {
    "step of allocate": lambda step: tk.allocate(PARAMS, FIXED, step=step),
    "step of allocate, dense": lambda step: tk.allocate(PARAMS, DENSE, step=step),
    "step of compute_masks": lambda step: tk.compute_masks(PARAMS, FIXED, step=step),
    "seed of compute_masks": lambda seed: tk.compute_masks(PARAMS, FIXED, seed=seed),
    "step of the penalty": lambda step: tk.exploration_penalty(PARAMS, MASKS, FIXED, step=step),
    "step of the loss": lambda step: tk.penalized_loss(
        MODEL, loss, PARAMS, MASKS, X, FIXED, step=step
    ),
    "step of check_counts": lambda step: check_counts(MASKS, PARAMS, FIXED, step=step),
    "step of Staged": lambda step: tk.staged({0: 0.5}).at(step),
    "seed of init_state": lambda seed: state(seed=seed),
    "mask_seed of init_state": lambda seed: state(mask_seed=seed),
    "seed of sparsify": lambda seed: tk.sparsify(nn.Linear(8, 4), FIXED, seed=seed),
    "seed of Sparsifier": lambda seed: tk.Sparsifier(sparse(), FIXED, seed=seed),
    "seed of SyntheticDataset": lambda seed: SyntheticDataset(4, seed=seed),
    "best of losses": lambda best: tk.plots.losses([1.0, 2.0], best=best),
}


@pytest.mark.parametrize(("name", "read"), COUNTERS.items(), ids=COUNTERS)
def test_a_counter_is_whole_and_not_negative(name: str, read: Callable[[Any], Any]) -> None:
    counter = name.partition(" ")[0]
    with pytest.raises(ValueError, match=f"^{counter} must be at least 0, got -1"):
        read(-1)
    for other in (True, 1.0, math.nan, "1", torch.ones(2)):
        with pytest.raises(TypeError, match=f"^{counter} must be an integer of at least 0"):
            read(other)
    read(0)
