"""An optimiser that would move sparse weights by views of them is refused."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from topkast_func import Sparsifier, TopKastConfig, sparsify

CONFIG = TopKastConfig(0.6, 0.3, refresh_every=3)


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 5))


def _train(model: nn.Module, sparsifier: Sparsifier, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(7, 6)).square().mean().backward()
        optimizer.step()
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
