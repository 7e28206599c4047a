"""Numbers that would overflow later are refused where they are given, by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import topkast_func as tk

HUGE = 10**30
MODEL = torch.nn.Linear(8, 4)


def _config(**fields: Any) -> Callable[[], Any]:
    return lambda: tk.TopKastConfig(**fields)


def _state(**fields: Any) -> Callable[[], Any]:
    return lambda: tk.init_state(MODEL, tk.TopKastConfig(), tk.sgd(0.1), **fields)


COUNTS: dict[str, Callable[[], Any]] = {
    "refresh_every": _config(refresh_every=HUGE),
    "a step of refresh_every": _config(refresh_every={0: 1, HUGE: 2}),
    r"refresh_every\[3\]": _config(refresh_every={0: 1, 3: HUGE}),
    "explore_until": _config(explore_until=2**63),
    "block_shape": _config(block_shape=(HUGE, 1)),
    "a step of staged": lambda: tk.staged({0: 0.5, HUGE: 0.9}),
    "begin": lambda: tk.cubic(0.1, 0.5, HUGE, 2 * HUGE),
    "end": lambda: tk.gmp(0, HUGE),
    "stages": lambda: tk.gmp(0, 2**62, stages=2**61),
    "every": lambda: tk.multi_steps(tk.sgd(0.1), HUGE),
    "every times that of the optimiser": lambda: tk.multi_steps(
        tk.multi_steps(tk.sgd(0.1), 2**40), 2**41
    ),
    "seed": _state(seed=2**63),
    "mask_seed": _state(mask_seed=HUGE),
    "step": lambda: tk.compute_masks(dict(MODEL.named_parameters()), tk.TopKastConfig(), step=HUGE),
}
NUMBERS: dict[str, Callable[[float], Any]] = {
    "penalty_weight": lambda number: tk.TopKastConfig(penalty_weight=number),
    "powerprop": lambda number: tk.TopKastConfig(powerprop=number),
    "lr": tk.sgd,
    "weight_decay": lambda number: tk.adamw(weight_decay=number),
    "eps": lambda number: tk.adam(eps=number),
    "lr at step 0": lambda number: tk.sgd(lambda step: number).learning_rate(torch.tensor(0)),
}


@pytest.mark.parametrize(("name", "make"), COUNTS.items(), ids=COUNTS)
def test_a_count_that_int64_has_not_is_refused(name: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be at most [0-9]*, got a larger one$"):
        make()


@pytest.mark.parametrize(("name", "make"), NUMBERS.items(), ids=NUMBERS)
def test_a_number_that_float32_has_not_is_refused(name: str, make: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be at most 3\.4.*, got 1e\+39"):
        make(1e39)
    with pytest.raises(ValueError, match=f"^{name} must be a number in .*, got one too large$"):
        make(10**400)


def test_the_largest_counts_are_taken() -> None:
    most = 2**63 - 1
    config = tk.TopKastConfig(0.5, refresh_every=most, explore_until=most)
    state = tk.init_state(MODEL, config, tk.sgd(0.1), seed=most)
    assert int(state.seed) == int(state.mask_seed) == most
    assert tk.cubic(0.0, 0.5, most - 2, most).steps == (0, most - 1, most)
