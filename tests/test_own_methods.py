"""Methods of one's own train as those of the library do, and what is wrong with one is told."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import topkast_func as tk
from tests.storage import STORAGES
from tests.test_methods import batch, mse, network
from topkast_func.sparsity import Allocation
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
        (lambda forward, backward: (forward.to_sparse(), backward), "must return masks of .*bool"),
        (lambda forward, backward: (mask for mask in (forward,)), "must return two masks"),
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
class Writing(tk.Method):
    """Drops and grows in the mask that it is given, by what it is given."""

    writes: bool
    reads_sets = True
    reads_gradient = True
    enters_at = "zero"

    def sets(self, situation: tk.Situation) -> tuple[Tensor, Tensor]:
        if situation.active is None or situation.gradient is None:
            active = torch.zeros_like(situation.scores, dtype=torch.bool)
            active.view(-1)[: situation.forward] = True
            return active, active
        given = [situation.scores, situation.active, situation.gradient]
        scores, active, gradient = given if self.writes else map(torch.clone, given)
        scores.abs_().masked_fill_(~active, torch.inf)
        gradient.abs_().masked_fill_(active, -1.0)
        active.view(-1)[scores.flatten().argsort()[:2]] = False
        active.view(-1)[gradient.flatten().argsort(descending=True)[:2]] = True
        return active, active


@pytest.mark.parametrize("storage", STORAGES)
def test_a_method_may_write_to_what_it_is_given(storage: Any) -> None:
    model, x = network(), batch(0)
    ended = []
    for writes in (True, False):
        config = replace(CONFIG, method=Writing(writes))
        state = tk.init_state(model, config, tk.sgd(0.1), storage=storage)
        gradients = tk.dense_gradients(model, mse, state, x)
        before = tk.masks_of(state), {name: g.clone() for name, g in gradients.items()}
        ended.append(tk.refresh(state, config, gradients=gradients))
        assert tk.masks_of(state).keys() == before[0].keys()
        for name, masks in tk.masks_of(state).items():
            assert all(map(torch.equal, masks, before[0][name]))
        assert all(map(torch.equal, gradients.values(), before[1].values()))
    written, copied = map(tk.dense_params, ended)
    for name, masks in tk.masks_of(ended[0]).items():
        assert (masks.forward & ~before[0][name].forward).any()
        assert torch.equal(masks.forward, tk.masks_of(ended[1])[name].forward)
        assert torch.equal(written[name], copied[name])


@dataclass(frozen=True)
class Reusing(Checkered):
    """Returns what it has returned before, with other numbers."""

    def sets(self, situation: tk.Situation) -> tuple[Tensor, Tensor]:
        masks = super().sets(situation)
        given = GIVEN.setdefault(situation.scores.shape, masks)
        for mask, new in zip(given, masks, strict=True):
            mask.copy_(new)
        return given


GIVEN: dict[torch.Size, tuple[Tensor, Tensor]] = {}


@pytest.mark.parametrize("storage", STORAGES)
def test_sets_are_copied_from_what_a_method_returns(storage: Any) -> None:
    torch.manual_seed(1)
    model, optimizer = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), tk.sgd(0.1)
    first, again = (
        tk.init_state(model, replace(CONFIG, method=kind()), optimizer, storage=storage)
        for kind in (Checkered, Reusing)
    )
    nn.init.normal_(model.get_parameter("0.weight"))
    tk.compute_masks(dict(model.named_parameters()), replace(CONFIG, method=Reusing()))
    for name, masks in tk.masks_of(first).items():
        assert all(map(torch.equal, masks, tk.masks_of(again)[name]))


@dataclass(frozen=True)
class Telling(Checkered):
    """Says of itself what it is given."""

    entry: Any = "value"
    steps: Any = ()
    share: Any = None

    @property
    def enters_at(self) -> Any:
        return self.entry

    def starts(self) -> Any:
        return self.steps

    def sparsities(self, asked: Any, step: int) -> Any:
        return asked if self.share is None else self.share


@pytest.mark.parametrize("said", ["ZERO", None, 0])
def test_an_entry_that_does_not_exist_is_named(said: Any) -> None:
    known = "'value', 'zero', 'threshold'"
    with pytest.raises(ValueError, match=f"enters_at must be one of {known}, got {said!r}"):
        replace(CONFIG, method=Telling(entry=said))


@pytest.mark.parametrize(
    ("error", "said"),
    [(TypeError, None), (TypeError, "12"), (TypeError, (2.5,)), (ValueError, (-1,))],
)
def test_steps_at_which_no_stage_can_start_are_named(error: Any, said: Any) -> None:
    with pytest.raises(error, match=r"starts\(\)"):
        replace(CONFIG, method=Telling(steps=said))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TypeError, 0.5),
        (ValueError, Allocation(1.5, 1.0)),
        (ValueError, Allocation(0.5, 0.9)),
        (TypeError, Allocation("half", 0.1)),  # type: ignore[arg-type]
    ],
)
def test_sparsities_that_are_none_are_named(error: Any, said: Any) -> None:
    with pytest.raises(error, match=r"what .*sparsities returns"):
        tk.init_state(network(), replace(CONFIG, method=Telling(share=said)), tk.sgd(0.1))
