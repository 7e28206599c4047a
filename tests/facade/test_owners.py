"""Which sparse weights a sparsifier has: those that it was made for, as they were then."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topkast_func as tk
from tests.facade.networks import PAPER

CONFIG = tk.TopKastConfig(0.75, 0.5, refresh_every=2, method=PAPER)
ASKED = ["step", "refresh", "masks", "penalty", "summary"]


class Pair(nn.Module):
    """Two layers, which may be tied."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.e, self.h = nn.Linear(8, 8), nn.Linear(8, 8)
        if tied:
            self.h.weight = self.e.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.h(self.e(x).relu())
        return y


def stack() -> nn.Sequential:
    """Return two layers of a size."""
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def trained(model: nn.Module, sparsifier: tk.Sparsifier, steps: int = 1) -> None:
    """Make steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for t in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(t))
        (model(x).square().mean() + sparsifier.penalty()).backward()
        optimizer.step()
        sparsifier.step()


def appended(model: Any) -> None:
    """Stack a copy of the first layer on."""
    model.append(copy.deepcopy(model[0]))
    nn.init.ones_(model[2].weight)


def replaced(model: Any) -> None:
    """Put a copy of the first layer in place of the second."""
    model[1] = copy.deepcopy(model[0])


def with_another(model: Any) -> None:
    """Append a model that was made sparse, with weights of other names."""
    other = nn.Module()
    other.inner = nn.Linear(8, 8)
    tk.sparsify(other, CONFIG)
    model.append(other.inner)


def with_a_namesake(model: Any) -> None:
    """Append a model that was made sparse, with weights of the same names."""
    other = stack()
    tk.sparsify(other, CONFIG)
    model.append(other)


def untied(model: Any) -> None:
    """Give the second layer a weight of its own."""
    model.h.weight = nn.Parameter(torch.randn(8, 8))


def tied(model: Any) -> None:
    """Let the second layer have the weight of the first."""
    model.h.weight = model.e.weight


COPIED = r"were copied, tied or given other parameters after tk\.sparsify.* and sparsify it again"
FOREIGN = r"were made sparse by another call of tk\.sparsify.* the sparsifier of that call"
CHANGES = {
    "appended": (stack, appended, r"\['0\.weight', '2\.weight'\] " + COPIED),
    "replaced": (stack, replaced, r"\['0\.weight', '1\.weight'\] " + COPIED),
    "with_another": (stack, with_another, r"\['2\.weight'\] " + FOREIGN),
    "with_a_namesake": (stack, with_a_namesake, r"\['2\.0\.weight', '2\.1\.weight'\] " + FOREIGN),
    "untied": (lambda: Pair(tied=True), untied, r"\['e\.weight', 'h\.weight'\] " + COPIED),
    "tied": (lambda: Pair(tied=False), tied, r"\['e\.weight', 'h\.weight'\] " + COPIED),
}


@pytest.mark.parametrize(("make", "change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_weights_that_are_not_as_they_were_made_sparse_are_named(
    make: Callable[[], Any], change: Callable[[Any], None], message: str
) -> None:
    model = make()
    sparsifier = tk.sparsify(model, CONFIG)
    trained(model, sparsifier)
    change(model)
    sets = {name: bits.clone() for name, bits in model.named_buffers()}
    for asked in ASKED:
        with pytest.raises(RuntimeError, match=message):
            getattr(sparsifier, asked)()
    with pytest.raises(RuntimeError, match=message):
        sparsifier.load_state_dict({"steps": 5, "seed": 1})
    assert sparsifier.state_dict() == {"steps": 1, "seed": 0, "powerprop": 1.0}
    assert all(torch.equal(bits, sets[name]) for name, bits in model.named_buffers())
    tk.densify(model)
    trained(model, tk.sparsify(model, CONFIG))


def test_what_was_changed_may_be_put_back() -> None:
    model = Pair(tied=True)
    sparsifier = tk.sparsify(model, CONFIG)
    untied(model)
    with pytest.raises(RuntimeError, match="put back what was there"):
        sparsifier.refresh()
    tied(model)
    trained(model, sparsifier, 3)
    assert list(sparsifier.masks()) == ["e.weight"]


def test_a_parameter_that_takes_the_place_of_another_is_trained() -> None:
    model = Pair(tied=False)
    sparsifier = tk.sparsify(model, CONFIG)
    untied(model)
    trained(model, sparsifier, 4)
    assert list(sparsifier.masks()) == ["e.weight", "h.weight"]


@pytest.mark.parametrize("part", ["whole", "a layer"])
def test_a_sparsifier_of_before_refuses_what_was_made_sparse_anew(part: str) -> None:
    model = stack()
    stale = tk.sparsify(model, CONFIG)
    changed: nn.Module = model if part == "whole" else model[0]
    tk.densify(changed)
    anew = tk.sparsify(changed, tk.TopKastConfig(0.5, 0.25, refresh_every=2))
    before = {name: bits.clone() for name, bits in model.named_buffers()}
    for asked in ASKED:
        with pytest.raises(RuntimeError, match=r"\['0\.weight'.*" + FOREIGN):
            getattr(stale, asked)()
    with pytest.raises(RuntimeError, match=FOREIGN):
        stale.load_state_dict({"steps": 5, "seed": 1})
    assert all(torch.equal(bits, before[name]) for name, bits in model.named_buffers())
    trained(changed, anew, 4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_a_copy_of_module_and_sparsifier_goes_on(copied: Any) -> None:
    model = Pair(tied=True)
    sparsifier = tk.sparsify(model, CONFIG)
    trained(model, sparsifier)
    runs = [copied((model, sparsifier)), (model, sparsifier)]
    for run in runs:
        trained(run[0], run[1], 5)
    for one, two in zip(*(run[0].state_dict().values() for run in runs), strict=True):
        assert torch.equal(one, two)


GRADUAL = tk.TopKastConfig(
    tk.staged({0: 0.25, 2: 0.5, 4: 0.75}), 0.25, refresh_every=2, method=PAPER
)
FORGOTTEN = r"'0\.weight' .* \(16, 48\), .* \(48, 48\).* Load the sparsifier's state dict too"


def test_a_stage_that_is_loaded_without_the_sparsifier_is_seen_at_the_refresh() -> None:
    model, fresh = stack(), stack()
    sparsifier, forgetful = (tk.sparsify(m, GRADUAL) for m in (model, fresh))
    trained(model, sparsifier, 5)
    fresh.load_state_dict(model.state_dict())
    trained(fresh, forgetful, 1)
    before = copy.deepcopy(fresh.state_dict())
    for refresh in (forgetful.refresh, lambda: trained(fresh, forgetful)):
        with pytest.raises(RuntimeError, match=FORGOTTEN):
            refresh()
        assert torch.equal(fresh.state_dict()["0.weight_sets"], before["0.weight_sets"])
        assert torch.equal(fresh.state_dict()["1.weight_sets"], before["1.weight_sets"])
    forgetful.load_state_dict(sparsifier.state_dict())
    trained(fresh, forgetful, 3)
    assert int(forgetful.masks()["0.weight"].forward.sum()) == 16


def test_weights_of_an_earlier_stage_may_be_put_back() -> None:
    model = stack()
    sparsifier = tk.sparsify(model, GRADUAL)
    trained(model, sparsifier, 1)
    best = copy.deepcopy(model.state_dict())
    trained(model, sparsifier, 4)
    model.load_state_dict(best)
    trained(model, sparsifier, 3)
    assert int(sparsifier.masks()["0.weight"].forward.sum()) == 16


@pytest.mark.parametrize("first", [0, 1])
def test_module_and_sparsifier_load_in_either_order(first: int) -> None:
    run, other = [(m, tk.sparsify(m, GRADUAL)) for m in (stack(), stack())]
    trained(run[0], run[1], 5)
    for part in (first, 1 - first):
        other[part].load_state_dict(run[part].state_dict())
    for one in (run, other):
        trained(one[0], one[1], 4)
    for key, tensor in run[0].state_dict().items():
        assert torch.equal(other[0].state_dict()[key], tensor), key


@pytest.mark.parametrize("what", ["dense", "masks", "frozen", "same stage"])
def test_other_changes_of_the_sets_are_no_forgotten_state(what: str) -> None:
    model, masks = stack(), None
    if what == "masks":
        masks = tk.compute_masks(dict(stack().named_parameters()), GRADUAL)
    sparsifier = tk.sparsify(model, GRADUAL, masks=masks)
    model[0].weight.requires_grad_(what != "frozen")
    trained(model, sparsifier, 3)
    if what == "dense":
        model.load_state_dict(stack().state_dict())
    if what == "same stage":
        other = stack()
        trained(other, tk.sparsify(other, GRADUAL), 2)
        model.load_state_dict(other.state_dict())
    trained(model, sparsifier, 3)
    model.requires_grad_()
    trained(model, sparsifier, 2)
    assert {int(sets.forward.sum()) for sets in sparsifier.masks().values()} == {16}


def test_a_copy_of_one_size_is_loaded_without_a_word_where_sparsity_stays() -> None:
    model, fresh = stack(), stack()
    runs = [(m, tk.sparsify(m, CONFIG)) for m in (model, fresh)]
    trained(*runs[0], steps=5)
    fresh.load_state_dict(model.state_dict())
    trained(*runs[1], steps=3)
