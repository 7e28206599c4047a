"""Who moves θ outside B beside the optimiser that has it is named."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from tests.facade.test_guard import _Lookahead
from topkast_func import Sparsifier, TopKastConfig, sparsify

CONFIG = TopKastConfig(0.6, 0.3, refresh_every=3)
WRITTEN = r"written to '[0-9]\.weight' outside B after the step of its optimizer"


class Slow:
    """Lookahead as it is often found: no optimiser, but what has one."""

    def __init__(self, inner: SGD) -> None:
        self.inner, self.count = inner, 0
        self.params = inner.param_groups[0]["params"]
        self.slow = [p.detach().clone() for p in self.params]

    def step(self) -> None:
        self.inner.step()
        self.count += 1
        for p, slow in zip(self.params, self.slow, strict=True) if self.count % 5 == 0 else ():
            p.data = slow.lerp_(p.detach(), 0.5).clone()


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 5))


def _train(model: nn.Module, sparsifier: Sparsifier, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(7, 6)).square().mean().backward()
        optimizer.step()
        sparsifier.step()


def test_a_wrapper_that_is_no_optimizer_is_noticed_where_it_writes() -> None:
    model = _model()
    sparsifier = sparsify(model, CONFIG)
    with pytest.warns(UserWarning, match=WRITTEN):
        _train(model, sparsifier, Slow(SGD(model.parameters(), lr=1.0)), 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_by_any_hand_is_noticed_in_each_layer_in_turn(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("topkast_func.facade.writers.WINDOW", 400)
    model = _model().to(dtype)
    sparsifier = sparsify(model, CONFIG)
    optimizer = SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(400):
            model.zero_grad()
            model(torch.randn(7, 6, dtype=dtype)).square().mean().backward()
            optimizer.step()
            for parameter in model.parameters():
                parameter.data.view(-1)[-100:] *= 0.9  # in the last of several windows
            sparsifier.step()
    told = [str(w.message).split("'")[1] for w in found]
    assert {*told} == {"0.weight", "2.weight"}
    assert len(told) < 100


def test_nobody_is_blamed_for_what_optimizers_refreshes_and_checkpoints_do() -> None:
    model = _model()
    sparsifier = sparsify(model, CONFIG)
    optimizer = SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    _train(model, sparsifier, _Lookahead(optimizer), 12)
    saved = copy.deepcopy((model.state_dict(), sparsifier.state_dict()))
    for way in ("refresh", "load"):
        _train(model, sparsifier, optimizer, 4)
        model(torch.randn(7, 6)).square().mean().backward()
        optimizer.step()
        if way == "refresh":
            sparsifier.refresh()
        else:
            model.load_state_dict(saved[0])
            sparsifier.load_state_dict(saved[1])
        sparsifier.step()


def _flat(model: nn.Module, parts: slice = slice(None)) -> nn.Parameter:
    """Put parameters of a model one after another into one tensor, of which they become views."""
    parameters = list(model.parameters())[parts]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    at = 0
    for p in parameters:
        p.data, p.grad = (t[at : at + p.numel()].view(p.shape) for t in (flat.data, flat.grad))
        at += p.numel()
    return flat


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("parts", [slice(None), slice(0, 3)])
def test_an_optimizer_over_a_flat_buffer_is_refused_before_it_moves(
    late: bool, parts: slice
) -> None:
    model = _model()
    flat = _flat(model, parts)
    optimizer = SGD([flat, *list(model.parameters())[3:]], lr=0.1, weight_decay=0.1)
    if late:
        sparsify(nn.Linear(3, 3), CONFIG)
        optimizer.step()
    sparsify(model, CONFIG)
    before = flat.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\['0\.weight', '2\.weight'\] are views.*parameters"):
            optimizer.step()
    assert torch.equal(flat, before)


def test_weights_that_only_lie_beside_others_in_memory_are_no_views_of_them() -> None:
    whole = torch.randn(6, 20)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    parts = zip(model.parameters(), ((0, 6), (12, 1), (6, 6), (13, 1)), strict=True)
    for parameter, (first, size) in parts:
        data = whole[:, first : first + size]
        parameter.data = data.squeeze(1) if size == 1 else data
    sparsifier = sparsify(model, TopKastConfig(0.6, 0.3, sparse="0.*"))
    theirs = nn.Parameter(whole[0, 14:])
    theirs.grad = torch.ones_like(theirs)
    _train(model, sparsifier, SGD([*model.parameters(), theirs], lr=0.1), 5)
