"""Attention in an ordinary loop: projections on the kernels, as torch computes them with α."""

import copy
import pickle
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import topkast_func as tk
from topkast_func.kernels.linear import sparse_linear

CONFIG = tk.TopKastConfig(0.75, 0.5)
PADDING = torch.arange(6) >= torch.tensor([[6], [4], [3]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)


class Attention(nn.Module):
    """Attention of a batch to itself, or to another, that is told how to attend."""

    def __init__(self, to_itself: bool = True, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
        self.to_itself, self.options = to_itself, {"need_weights": False, **options}

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.to_itself else x + 1
        found: tuple[Tensor, Tensor | None] = self.attention(x, other, other, **self.options)
        return found[0] if found[1] is None else found[0].mean() + found[1]


def encoder() -> nn.Module:
    """Return a layer of a transformer, which drops nothing."""
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Mock:
    counted = Mock(wraps=sparse_linear)
    monkeypatch.setattr("topkast_func.facade.sparse_linear.sparse_linear", counted)
    return counted


def _gradients(run: Any, parameters: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = run(x)
    return (y, *torch.autograd.grad(y.sin().sum(), [x, *parameters]))


def _inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 6, 16, generator=generator).requires_grad_()


def _check(model: nn.Module, config: tk.TopKastConfig = CONFIG) -> tk.Sparsifier:
    """Compare output and gradients on the kernels with those of torch."""
    plain = copy.deepcopy(model)
    sparsifier = tk.sparsify(model, config, engine="numba")
    dense = tk.sparsify(plain, config, engine="dense")
    found, expected = (_gradients(m, m.parameters(), _inputs()) for m in (model, plain))
    torch.testing.assert_close(found, expected)
    assert dense.masks().keys() == sparsifier.masks().keys()
    gradients = dict(zip(dict(model.named_parameters()), found[2:], strict=True))
    for name, (forward, backward) in sparsifier.masks().items():
        assert gradients[name][backward & ~forward].any()
        assert not gradients[name][~backward].any()
    return sparsifier


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": False},
        {"key_padding_mask": PADDING},
        {"attn_mask": CAUSAL, "is_causal": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_projections_run_on_the_kernels(options: dict[str, Any], products: Mock) -> None:
    sparsifier = _check(Attention(**options))
    assert products.call_count == 2
    engines = {row.name: row.engine for row in sparsifier.summary().rows}
    assert engines["attention.in_proj_weight"] == engines["attention.out_proj.weight"] == "numba"


@pytest.mark.parametrize("options", [{"need_weights": True}, {"to_itself": False}])
def test_all_else_is_computed_with_alpha(options: dict[str, Any], products: Mock) -> None:
    _check(Attention(**options))
    assert not products.called


@pytest.mark.parametrize("dense", ["*in_proj*", "*out_proj*"])
def test_one_projection_may_be_dense(dense: str, products: Mock) -> None:
    _check(Attention(), tk.TopKastConfig(0.75, 0.5, keep_dense=dense))
    assert products.call_count == 1


def test_attention_that_adds_keys_is_not_told_to_run_on_kernels(products: Mock) -> None:
    model = Attention()
    model.attention.add_zero_attn = True
    reasons = {row.name: row.reason for row in _check(model).summary().rows}
    assert not products.called
    for name in ("in_proj_weight", "out_proj.weight"):
        assert reasons[f"attention.{name}"] == "all of α: of no layer that kernels know"


def test_a_layer_of_a_transformer_in_training_and_in_evaluation(products: Mock) -> None:
    model = encoder()
    plain = copy.deepcopy(model)
    sparsifier = _check(model)
    assert products.call_count == 4
    expected = tk.densify(copy.deepcopy(model)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(_inputs()), expected(_inputs()))
    theta = dict(plain.named_parameters())
    found = tk.sparse_forward(plain, theta, sparsifier.masks(), _inputs())
    torch.testing.assert_close(model.train()(_inputs()), found)


def test_compiled_equals_eager_in_one_graph() -> None:
    torch.compiler.reset()
    model = encoder()
    _check(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = _gradients(model, model.parameters(), _inputs())
    torch.testing.assert_close(_gradients(compiled, model.parameters(), _inputs()), expected)


def test_the_gradient_of_every_entry_reaches_a_method_that_reads_it(products: Mock) -> None:
    found = []
    for engine in ("numba", "dense"):
        model = encoder()
        config = tk.TopKastConfig(0.75, refresh_every=2, method=tk.rigl())
        sparsifier = tk.sparsify(model, config, engine=engine)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(_inputs()).sin().sum().backward()
            optimizer.step()
            sparsifier.step()
        found.append(sparsifier.masks())
    assert products.call_count == 8  # the step before the refresh reads them densely
    for one, other in zip(*(masks.values() for masks in found), strict=True):
        assert torch.equal(one.forward, other.forward)


def test_a_copy_and_a_pickle_compute_the_same() -> None:
    model = encoder()
    tk.sparsify(model, CONFIG, engine="numba")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(_inputs()), model(_inputs()))
