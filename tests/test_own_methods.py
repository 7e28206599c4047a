"""Methods of one's own train as those of the library do, and what is wrong with one is told."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import topkast_func as tk
from tests.storage import STORAGES
from tests.test_methods import batch, mse, network
from topkast_func.testing import check_counts, check_nested, check_outside_untouched


@dataclass(frozen=True)
class Checkered(tk.Method):
    """Keeps the largest of every other entry.

    Attributes:
        offset: Where it starts.
    """

    offset: int = 0
    explores: ClassVar[bool] = True

    def sets(self, situation: tk.Situation) -> tuple[Tensor, Tensor]:
        magnitudes = situation.scores.abs().flatten().clone()
        magnitudes[self.offset :: 2] += magnitudes.max() + 1
        order = magnitudes.argsort(descending=True, stable=True)
        masks = []
        for count in (situation.forward, situation.backward):
            mask = torch.zeros_like(magnitudes, dtype=torch.bool)
            mask[order[:count]] = True
            masks.append(mask.view(situation.scores.shape))
        return masks[0], masks[1]


@dataclass(frozen=True)
class Wrong(Checkered):
    """Spoils what it has chosen.

    Attributes:
        spoil: How.
    """

    spoil: Callable[[Tensor, Tensor], Any] = lambda forward, backward: None

    def sets(self, situation: tk.Situation) -> Any:
        return self.spoil(*super().sets(situation))


CONFIG = tk.TopKastConfig(0.75, 0.5, refresh_every=2, method=Checkered(1))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])
def test_a_method_of_ones_own_trains(storage: Any, compile: Any) -> None:
    model, optimizer = network(), tk.adamw(0.01)
    state = tk.init_state(model, CONFIG, optimizer, storage=storage)
    train_step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=compile)
    for t in range(5):
        before = state
        state, metrics = train_step(before, batch(t))
        assert bool(metrics.refreshed) == (t in (2, 4))
        assert float(metrics.penalty) > 0
        masks, theta = tk.masks_of(state), tk.dense_params(state)
        check_nested(masks, theta)
        check_counts(masks, theta, CONFIG)
        assert all(not sets.forward.flatten()[::2].any() for sets in masks.values())
        if t not in (2, 4):
            check_outside_untouched(before, state)


def test_configurations_with_it_are_values_and_pickle_and_have_no_json() -> None:
    assert replace(CONFIG, method=Checkered(1)) == CONFIG != replace(CONFIG, method=Checkered(2))
    assert pickle.loads(pickle.dumps(CONFIG)) == CONFIG
    assert len({CONFIG, replace(CONFIG, method=Checkered(1))}) == 1
    with pytest.raises(ValueError, match=r"method is the code of .*\.Checkered, which JSON cannot"):
        CONFIG.to_json()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda forward, backward: None, "must return two masks"),
        (lambda forward, backward: forward, "must return two masks"),
        (lambda forward, backward: (forward.float(), backward), "must return masks of .*bool"),
        (lambda forward, backward: (forward[:1], backward), "must return masks of .*bool"),
        (
            lambda forward, backward: (backward, backward),
            r"must choose \(24, 48\) entries for A and B, and has chosen \(48, 48\)",
        ),
        (lambda forward, backward: (forward, ~backward), "an A that is not part of B"),
    ],
)
def test_what_is_wrong_with_a_method_is_told(spoil: Any, message: str) -> None:
    config = replace(CONFIG, method=Wrong(0, spoil))
    with pytest.raises(ValueError, match=rf"Wrong\(.*\).sets, for '0.weight', .*{message}"):
        tk.init_state(network(), config, tk.sgd(0.1))


@dataclass(frozen=True)
class Writing(Checkered):
    """Works in place on what it chooses by."""

    def sets(self, situation: tk.Situation) -> tuple[Tensor, Tensor]:
        situation.scores.abs_()
        return super().sets(situation)


def test_a_method_that_writes_to_the_weights_is_named() -> None:
    params = dict(network().named_parameters())
    with pytest.raises(ValueError, match=r"sets writes to the scores of '0.weight': copy them"):
        tk.compute_masks(params, replace(CONFIG, method=Writing()))
