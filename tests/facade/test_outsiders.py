"""A weight that is read around a sparse module is θ, and who reads it is told so."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import topkast_func as tk

CONFIG = tk.TopKastConfig(0.8, 0.6)
READ = r"^'weight' reads as θ, dense, .* sparsify the module around it"


class Tied(nn.Module):
    """Multiplies by the weight of a layer a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.inner(x), self.inner.weight)


def test_a_module_around_a_sparse_one_that_computes_with_its_weight_is_told_once() -> None:
    model, x = Tied(), torch.randn(4, 8)
    tk.sparsify(model.inner, CONFIG)
    with pytest.warns(UserWarning, match=READ) as found:
        model(x)
    assert len(found) == 1
    assert found[0].filename == __file__
    model(x)
    tk.densify(model)
    tk.sparsify(model, CONFIG)
    model(x)


@pytest.mark.parametrize(
    "register", [nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook]
)
def test_a_hook_of_the_outermost_module_that_reads_its_weight_is_told(register: Any) -> None:
    model = nn.Linear(8, 8)
    tk.sparsify(model, CONFIG)
    seen: list[Tensor] = []
    register(model, lambda module, *_: seen.append(module.weight))
    with pytest.warns(UserWarning, match=READ):
        model(torch.randn(4, 8))
    assert (seen[0] != 0).all()


def test_who_looks_at_a_weight_elsewhere_hears_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sparsifier = tk.sparsify(model, CONFIG)
    seen: list[Tensor] = []
    layer: Any = model[0]
    layer.register_forward_hook(lambda module, *_: seen.append(module.weight))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, 8)).sum().backward()
        assert (layer.weight != 0).all()
        sparsifier.summary()
    assert (seen[0] == 0).any()
