"""Graphs in which what stands between two layers is computed in tiles."""

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import fresh_cache
from torch.func import functionalize, grad
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

import topkast_func as tk
from tests.kernels.problems import problem
from topkast_func.kernels import sparse_linear
from topkast_func.kernels.between import StayInTiles
from topkast_func.kernels.tiles import TRANSPOSED

Between: TypeAlias = Callable[[Tensor, Tensor], Tensor]
HIDDEN, FEATURES, ROWS = 96, 64, (32, 32)
LEFT = 4  # into the first layer and out of the second, forward and backward


IN_TILES: dict[str, Between] = {
    "nothing": lambda h, _: h,
    "relu": lambda h, _: h.relu(),
    "gelu": lambda h, _: functional.gelu(h),
    "gelu by tanh": lambda h, _: functional.gelu(h, approximate="tanh"),
    "silu times itself": lambda h, _: functional.silu(h) * h,
    "a number": lambda h, _: 2 * h.tanh() + 1,
    "a number in a tensor": lambda h, _: h * torch.tensor(0.5, dtype=h.dtype),
    "numbers of features": lambda h, _: h * torch.linspace(0, 1, HIDDEN, dtype=h.dtype),
    "another dtype": lambda h, _: h.float().relu().to(h.dtype),
    "other rows": lambda h, _: h.flatten(0, 1).relu().view(8, 128, HIDDEN),
    "a copy": lambda h, _: h.clone().relu(),
}
NOT: dict[str, Between] = {
    "sums over features": lambda h, _: functional.layer_norm(h, (HIDDEN,)),
    "sums of rows": lambda h, _: h - h.mean(0, keepdim=True),
    "another tensor": lambda h, other: h.relu() * other,
    "a number a row": lambda h, other: h * other[..., :1],
    "rows apart": lambda h, _: h.transpose(0, 1).relu(),
    "features apart": lambda h, _: h.view(*ROWS, 8, 12).mT.flatten(2).relu(),
    "read elsewhere too": lambda h, _: h.relu() + h.detach().sum(),
    "as many features of other rows": lambda h, _: h.view(-1, HIDDEN // 2)[::2].repeat(1, 2).relu(),
}


def traced(
    between: Between, dtype: torch.dtype = torch.float64, rows: tuple[int, ...] = ROWS
) -> tuple[GraphModule, list[Tensor]]:
    """Trace the gradients of two layers with something between them, and their arguments."""
    first, second = (
        problem(dtype=dtype, grid=grid) for grid in ((HIDDEN, FEATURES), (FEATURES, HIDDEN))
    )
    patterns = first.pattern, second.pattern
    other = torch.rand(*rows, HIDDEN, dtype=dtype)
    biases = (torch.randn(n, dtype=dtype) for n in (HIDDEN, FEATURES))

    def loss(x: Tensor, v: Tensor, b: Tensor, w: Tensor, c: Tensor) -> Tensor:
        h = between(sparse_linear(x, v, patterns[0], first.shape, b, "numba"), other)
        return sparse_linear(h, w, patterns[1], second.shape, c, "numba").square().sum()

    values = first.values / 20, second.values / 20
    b, c = biases
    given = [torch.randn(*rows, FEATURES, dtype=dtype), values[0], b, values[1], c]
    gradients = functionalize(grad(loss, argnums=tuple(range(5))))
    return make_fx(gradients, decomposition_table=select_decomp_table())(*given), given


def transposed(graph: Graph) -> int:
    return sum(node.target is TRANSPOSED for node in graph.nodes)


def checked(module: GraphModule, given: list[Tensor], tolerance: float = 1e-11) -> tuple[int, int]:
    """Return how often a graph transposes before and after, if the pass does not change it."""
    before, expected = transposed(module.graph), module(*given)
    StayInTiles()(module.graph)
    module.graph.lint()
    module.recompile()
    for found, right in zip(module(*given), expected, strict=True):
        assert right.any()
        assert (found.dtype, found.shape) == (right.dtype, right.shape)
        assert torch.allclose(found, right, rtol=tolerance, atol=tolerance * right.abs().max())
    return before, transposed(module.graph)


@pytest.mark.parametrize("between", IN_TILES.values(), ids=IN_TILES)
def test_what_is_pointwise_stays_in_tiles(between: Between) -> None:
    tolerance = 1e-5 if between is IN_TILES["another dtype"] else 1e-11
    assert checked(*traced(between), tolerance) == (LEFT + 4, LEFT)


@pytest.mark.parametrize("between", NOT.values(), ids=NOT)
def test_what_is_more_has_features_last(between: Between) -> None:
    before, after = checked(*traced(between))
    assert before == after == LEFT + 4


def test_tiles_of_other_widths_do_not_meet() -> None:
    layer = problem(grid=(HIDDEN, HIDDEN))
    values, sets = layer.values / 20, layer.pattern

    def between(h: Tensor, _: Tensor) -> Tensor:
        narrow = h.float()  # twice as many rows to a tile
        return h * sparse_linear(narrow, values, sets, layer.shape, engine="numba").double()

    before, after = checked(*traced(between), 1e-5)
    assert before == after == LEFT + 8


def by_sums(h: Tensor) -> Tensor:
    return h - h.sum((0, 1))


def by_constants(h: Tensor) -> Tensor:
    counts = (8 * h).round().clamp(-100, 100).to(torch.int8) + torch.full(h.shape[-1:], 128)
    return h * torch.full(h.shape[-1:], 0.5, dtype=torch.float32) + counts


def narrow_by_constants(h: Tensor) -> Tensor:
    return (h.bfloat16() * torch.full(h.shape[-1:], 1.01, dtype=torch.float32)).to(h.dtype)


@pytest.mark.parametrize("between", [by_sums, by_constants, narrow_by_constants])
@pytest.mark.parametrize("hidden", [HIDDEN, 64])  # 64 is the width of a tile, too
def test_numbers_of_features_keep_their_axis_and_constants_their_dtype(
    between: Callable[[Tensor], Tensor], hidden: int
) -> None:
    first, second = (problem(dtype=torch.float64, grid=g) for g in ((hidden, 64), (64, hidden)))
    sets, values = (first.pattern, second.pattern), (first.values / 20, second.values / 20)

    def forward(x: Tensor, v: Tensor, w: Tensor) -> list[Tensor]:
        h = between(sparse_linear(x, v, sets[0], first.shape, None, "numba"))
        return [sparse_linear(h, w, sets[1], second.shape, None, "numba")]

    given = [torch.randn(*ROWS, 64, dtype=torch.float64), *values]
    decompositions = select_decomp_table()
    module = make_fx(functionalize(forward), decomposition_table=decompositions)(*given)
    assert checked(module, given) == (4, 2)


def test_what_is_padded_has_features_last() -> None:
    assert checked(*traced(IN_TILES["relu"], rows=(31, 33))) == (LEFT + 4, LEFT + 4)


class Feed(nn.Module):
    """A feed-forward part of a transformer, gated."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.into, self.out = (
            nn.Linear(FEATURES, HIDDEN),
            nn.Linear(FEATURES, HIDDEN),
            nn.Linear(HIDDEN, FEATURES),
        )

    def forward(self, x: Tensor) -> Tensor:
        fed: Tensor = self.out(functional.silu(self.gate(x)) * self.into(x))
        return x + fed


def loss_fn(apply: Callable[..., Tensor], batch: Tensor) -> Tensor:
    loss: Tensor = (apply(batch) - 1).square().mean()
    return loss


def test_a_compiled_step_stays_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    rewrite = StayInTiles.__call__

    def watched(self: StayInTiles, graph: Graph) -> None:
        before = transposed(graph)
        rewrite(self, graph)
        found.append((before, transposed(graph)))

    monkeypatch.setattr(StayInTiles, "__call__", watched)
    model, x = Feed().double(), torch.randn(*ROWS, FEATURES, dtype=torch.float64)
    config, optimizer = tk.TopKastConfig(0.8, 0.5), tk.adam(lr=0.01)
    begun = tk.init_state(model, config, optimizer)
    ended = []
    for compile in (True, False):
        step, state = tk.make_train_step(model, loss_fn, config, optimizer, compile=compile), begun
        with fresh_cache():
            for _ in range(3):
                state, _ = step(state, x)
        ended.append(tk.dense_params(state))
    assert found == [(10, 4)]
    for name, parameter in model.named_parameters():
        compiled, eager = (params[name] for params in ended)
        assert not torch.equal(eager, parameter)
        assert torch.allclose(compiled, eager, atol=1e-9)
