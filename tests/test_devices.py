"""Devices that are asked for: there, and with values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import topkast_func as tk

CONFIG, OPTIMIZER = tk.TopKastConfig(), tk.sgd(0.1)


@pytest.mark.parametrize("load", [tk.load, tk.load_sharded])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"device": "meta"}, "^device must be a device that holds values, which 'meta' does not"),
        ({"theta_device": "meta"}, "^theta_device must be a device that holds values"),
        ({"device": "attic"}, "^device must be a device that is there, got 'attic': "),
        ({"device": "lazy:3"}, "^device must be a device that is there, got 'lazy:3': "),
        ({"theta_device": "attic"}, "^theta_device must be a device that is there, got 'attic'"),
    ],
)
def test_a_device_without_values_is_named(
    load: Callable[..., Any], where: Any, message: str, tmp_path: Path
) -> None:
    state = tk.init_state(nn.Linear(6, 3), CONFIG, OPTIMIZER)
    save = tk.save if load is tk.load else tk.save_sharded
    save(state, tmp_path / "state", CONFIG)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "state", **where)
    assert int(load(tmp_path / "state", device="cpu", theta_device="cpu").step) == 0


def test_theta_rests_where_there_are_values() -> None:
    with pytest.raises(ValueError, match=r"^theta_device must be a device that holds values"):
        tk.init_state(nn.Linear(6, 3), CONFIG, OPTIMIZER, theta_device="meta")
