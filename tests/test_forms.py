"""A state with something else in the place of a part of it is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topkast_func as tk
from topkast_func import TopKastConfig, TrainState, adamw, init_state, make_train_step

CONFIG, OPTIMIZER = TopKastConfig(0.6, 0.3), adamw(1e-3)
OTHERS: list[Any] = [None, 3, "x", [1], (), {"0.weight": None}, {"0.weight": {"0.weight": 3}}]
"""What is no tensor, no dictionary of tensors and no tuple of those."""


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))


def _state(storage: Any = "compact") -> TrainState:
    return init_state(_model(), CONFIG, OPTIMIZER, storage=storage)


def _step(state: TrainState) -> Any:
    def loss(apply: Any, x: Tensor) -> Tensor:
        return (apply(x) ** 2).mean()

    return make_train_step(_model(), loss, CONFIG, OPTIMIZER, compile=False)(
        state, torch.ones(3, 6)
    )


USES: dict[str, Callable[[TrainState], Any]] = {
    "step": _step,
    "refresh": lambda state: tk.refresh(state, CONFIG),
    "dense_params": tk.dense_params,
    "forward_params": tk.forward_params,
    "masks_of": tk.masks_of,
    "save": lambda state: tk.save(state, Path("never.pt")),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("field", TrainState._fields)
def test_a_field_of_another_type_is_named(field: str, use: Callable[[TrainState], Any]) -> None:
    state = _state()
    for other in OTHERS:
        with pytest.raises(TypeError, match=rf"state\.{field}.* must be of type .*, got "):
            use(state._replace(**{field: other}))


@pytest.mark.parametrize("storage", ["compact", "dense"])
@pytest.mark.parametrize("field", ["weights", "optimizer"])
def test_a_field_of_a_part_is_named(field: str, storage: str) -> None:
    state = _state(storage)
    part: Any = getattr(state, field)
    for inner in part._fields:
        for other in OTHERS:
            replaced = state._replace(**{field: part._replace(**{inner: other})})
            with pytest.raises(TypeError, match=rf"state\.{field}\.{inner}.* must be of type"):
                _step(replaced)
            assert repr(replaced).startswith(f"TrainState(state.{field}.{inner}")
