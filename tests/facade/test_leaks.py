"""Something that computes with θ in place of α is told of, once."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topkast_func as tk
from tests.facade.networks import Case, each_case

CONFIG = tk.TopKastConfig(0.8, 0.5, refresh_every=2)
TOLD = r"the gradient of \['a\.weight'\] reaches what lies outside B, .* reference .* was kept"


class Net(nn.Module):
    """A layer whose weight is read in its place, or by a reference that was kept."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(8, 8), nn.Linear(8, 8), kept
        self.weights = [self.a.weight]

    def encode(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.a.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(x @ self.weights[0].T if self.kept else self.a(x))
        return y


def of_kept(model: Net, x: Tensor) -> Tensor:
    """Return a loss that reads θ where the model has kept it."""
    return model(x).square().mean()


def of_method(model: Net, x: Tensor) -> Tensor:
    """Return a loss of a method other than forward."""
    return (model(x) + model.encode(x)).square().mean()


def of_parameters(model: Net, x: Tensor) -> Tensor:
    """Return a loss with a penalty of one's own."""
    return model(x).square().mean() + model.a.weight.square().sum()


def trained(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, **options: Any) -> None:
    """Make a model sparse, and some steps."""
    sparsifier = tk.sparsify(model, options.pop("config", CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        (loss(model, x) + sparsifier.penalty()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        sparsifier.step()


@pytest.mark.parametrize("loss", [of_kept, of_method, of_parameters])
def test_what_reads_theta_is_told_of_once(loss: Callable[..., Tensor]) -> None:
    with pytest.warns(UserWarning, match=TOLD) as told:
        trained(Net(kept=loss is of_kept), loss, torch.randn(4, 8))
    assert [Path(warning.filename).name for warning in told] == ["test_leaks.py"]


@each_case
@pytest.mark.parametrize("powerprop", [1.0, 2.0])
def test_nothing_is_said_of_what_reads_alpha(case: Case, powerprop: float) -> None:
    config = tk.TopKastConfig(
        0.75, 0.5, sparse=case.config.sparse, penalty_weight=1e-2, powerprop=powerprop
    )
    loss = lambda model, x: model(x).square().mean()  # noqa: E731
    trained(case.make(), loss, case.inputs(), config=config)


def test_nothing_is_said_while_every_gradient_is_read() -> None:
    config = tk.TopKastConfig(0.8, refresh_every=1, method=tk.rigl())
    trained(Net(kept=True), of_kept, torch.randn(4, 8), config=config)


@pytest.mark.parametrize("what", ["none", "sparse", "nan"])
def test_gradients_that_tell_nothing_are_passed_over(what: str) -> None:
    model: Any = nn.Embedding(8, 8)
    tk.sparsify(model, CONFIG)
    model(torch.arange(4)).sum().backward()
    gradient = {
        "none": None,
        "sparse": torch.ones(8, 8).to_sparse(),
        "nan": torch.full((8, 8), math.nan),
    }[what]
    model.weight.grad = gradient
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert (model.weight.grad is None) == (what == "none")
