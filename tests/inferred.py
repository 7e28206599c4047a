"""Sparse modules for tests, beside the plain models at α."""

import copy
from typing import Any

import pytest
from torch import nn

import topkast_func as tk

small = pytest.mark.usefixtures("small_layers_pay")
"""See the fixture."""


def made(
    model: nn.Module, config: tk.TopKastConfig | None = None, batch_size: int = 64, **options: Any
) -> tuple[nn.Module, nn.Module, tk.TrainState]:
    """Make the sparse module, the plain model at α, and the state."""
    state = tk.init_state(model, config or tk.TopKastConfig(0.9), tk.sgd(0.1), **options)
    plain = copy.deepcopy(model).eval()
    plain.load_state_dict(tk.forward_params(state), strict=False)
    return tk.sparse_module(state, model, batch_size), plain, state


def layers(module: nn.Module) -> list[tk.SparseLinear]:
    """Return the sparse layers of a module."""
    return [part for part in module.modules() if isinstance(part, tk.SparseLinear)]
