"""The dense products where oneDNN is not there, and as on a device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.func import grad, vmap

import topkast_func as tk
from tests.kernels.problems import check_products, integers, problem
from tests.kernels.test_derivatives import COMPILED, WAYS, by_jvp, case_of, ours
from tests.kernels.test_derivatives import dense as dense_loss
from tests.kernels.test_linear import (
    Case,
    Gradients,
    by_backward,
    by_compiled_backward,
    by_compiled_func,
    by_func,
    compiled,
)
from tests.on_device import energy
from topkast_func.kernels import dense, linear
from topkast_func.kernels.pattern import BlockRows, flat


@pytest.mark.parametrize("batch", [0, 5])
def test_products_without_onednn(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    check_products("dense", problem(), batch)


@pytest.fixture
def _on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as on a device other than the CPU, with places of A that products share."""
    for module in (dense, linear):
        monkeypatch.setattr(module, "on_device", lambda values: True)


as_on_a_device = pytest.mark.usefixtures("_on_device")
blocks = pytest.mark.parametrize(
    ("block", "transposed"), [((1, 1), False), ((1, 1), True), ((2, 3), True)]
)


@as_on_a_device
@blocks
@pytest.mark.parametrize("way", [by_func, by_compiled_func, by_backward, by_compiled_backward])
def test_the_gradient_is_the_dense_one_at_alpha_on_b(
    way: Callable[[Case], Gradients], block: tuple[int, int], transposed: bool
) -> None:
    case = Case("dense", block, torch.float32, transposed)
    for found, expected in zip(way(case), case.gradients(), strict=True):
        assert torch.equal(found, expected)


@as_on_a_device
@blocks
@pytest.mark.parametrize("way", WAYS)
def test_other_derivatives_are_those_of_a_dense_layer(
    way: Callable[..., Any], block: tuple[int, int], transposed: bool
) -> None:
    case = case_of("dense", block, transposed)
    torch.testing.assert_close(way(ours(case), *case.leaves), way(dense_loss(case), *case.leaves))


@as_on_a_device
@pytest.mark.parametrize("way", COMPILED)
def test_compiled_equals_eager(way: Callable[..., Any]) -> None:
    case = case_of("dense", (1, 1), transposed=False)
    expected = way(ours(case), *case.leaves)
    if way is not by_jvp:
        exploring = case.given.gathered(case.given.backward & ~case.given.forward)
        assert expected[0][exploring].any()
    found = compiled(lambda *leaves: way(ours(case), *leaves), "dense")(*case.leaves)
    torch.testing.assert_close(found, expected)


@as_on_a_device
def test_gradients_per_sample() -> None:
    case = Case("dense", (1, 1), torch.float32)
    values = torch.stack((case.given.values, integers(*case.given.values.shape)))
    for dims in ((None, 0, None), (0, None, None)):
        leaves = (values if dims[0] == 0 else case.given.values, case.x, case.bias)
        found = vmap(grad(case.loss), in_dims=dims)(*leaves)
        one = [leaf if dim is None else leaf[1] for leaf, dim in zip(leaves, dims, strict=True)]
        assert torch.equal(found[1], grad(case.loss)(*one))


@as_on_a_device
def test_a_step_finds_out_once_where_the_values_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of A in the graph, for three products, those of B∖A in the one that reads them."""
    seen: list[str] = []

    def noted(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def counted(part: BlockRows, *given: Any) -> Tensor:
        calls.append(part.columns.shape[0])
        return flat(part, *given)

    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    config, optimizer, calls = tk.TopKastConfig(0.75, 0.5), tk.adam(0.01), list[int]()
    backend = aot_autograd(fw_compiler=noted)
    ends = []
    monkeypatch.setattr(dense, "flat", counted)
    for compile in (False, {"backend": backend}):
        step = tk.make_train_step(model, energy, config, optimizer, compile=compile, engine="dense")
        state, _ = step(tk.init_state(model, config, optimizer), torch.ones(8, 32))
        ends.append(tk.dense_params(state))
        if not compile:
            assert sorted(calls) == [256, 256, 512, 512]
    torch.testing.assert_close(*ends)
    products = [name.split(".")[1] for name in seen if name.startswith("topkast_func")]
    assert sorted(products) == ["forward"] * 2 + ["transposed_forward"] + ["weight_gradient"] * 2
    assert sum("repeat_interleave" in name for name in seen) == 2
