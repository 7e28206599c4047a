"""A state that is printed fits a screen."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import topkast_func as tk
from tests.storage import STORAGES

CONFIG = tk.TopKastConfig(0.9, 0.8)


def deep(layers: int) -> nn.Module:
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10)) for _ in range(layers))
    )
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("storage", STORAGES)
def test_a_state_of_many_layers_fits_a_screen(storage: Any) -> None:
    state = tk.init_state(deep(100), CONFIG, tk.adamw(), storage=storage, seed=2**63 - 1)
    lines = repr(state).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"TrainState(step=0, seed={2**63 - 1}, mask_seed={2**63 - 1})"
    assert lines[1] == f"  {storage} storage: 396 parameters of 12,870 entries"
    assert lines[2] == "  99 of them sparse: 9,900 entries, 10.00% in A, 20.00% in B"
    assert lines[3] == "  slots: adamw.exp_avg, adamw.exp_avg_sq"
    assert lines[4].startswith("  buffers: 0.1.running_mean, 0.1.running_var, ")


def test_dense_training_and_ensembles_print_too() -> None:
    config = tk.TopKastConfig(method=tk.dense())
    state = tk.init_state(deep(2), config, tk.sgd(0.1))
    assert "sparse" not in repr(state)
    assert "slots: none" in repr(state)
    ensemble = tree_map(lambda leaf: torch.stack([leaf] * 3), state)
    assert repr(ensemble).startswith("TrainState(step=tensor of [3], seed=tensor of [3]")
    torch.vmap(lambda state: repr(state) and state.step)(ensemble)
