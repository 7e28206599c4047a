"""bfloat16 on the CPU: products in pairs, sums in float32, one rounding, on any processor."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad

import topkast_func as tk
from tests.kernels.problems import BLOCKS, check_products, integers, problem, products
from topkast_func.kernels import llvm, numba_cpu, pattern_of, sparse_linear

HALF = torch.bfloat16
AOT = {"backend": "aot_eager"}
MAKERS = (numba_cpu._rows_kernel, numba_cpu._dots_kernel)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make kernels as on a processor that does not multiply bfloat16."""
    monkeypatch.setattr(llvm, "multiplies_bfloat16", lambda: False)
    for maker in MAKERS:
        maker.cache_clear()
    yield
    for maker in MAKERS:
        maker.cache_clear()


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("block", [*BLOCKS, (3, 2), (17, 1)])
def test_processors_without_bfloat16_compute_the_same(block: tuple[int, int]) -> None:
    assert "dpbf16ps" not in numba_cpu._rows_kernel(block, False, HALF)._source()
    check_products("numba", problem(block, HALF), 77)


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (3, 5)])
def test_sums_are_those_of_float32_rounded_to_the_nearest(block: tuple[int, int]) -> None:
    given = problem(block, HALF)
    given = given._replace(theta=torch.randn(given.shape).to(HALF))
    x, g = (torch.randn(300, n).to(HALF) for n in reversed(given.shape))
    alpha = given.alpha.double()
    full = (
        x.double() @ alpha.t(),
        g.double() @ alpha,
        given.gathered(g.double().t() @ x.double()),
    )
    for found, expected in zip(products("numba", given, x, g), full, strict=True):
        assert found.any()
        spacing = 2.0 ** (expected.abs().log2().floor() - 7)
        assert ((found.double() - expected).abs() <= 0.501 * spacing + 1e-4).all()


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FFF, 0xFFC1, 0x7F81, 0x7F7F, 0x0080])
def test_numbers_at_the_ends_stay_what_they_are(bits: int) -> None:
    """±∞, NaN of any bits, the largest number, and the smallest that is normal."""
    diagonal, values = torch.eye(4, dtype=torch.bool), torch.ones(4, dtype=HALF)
    x = torch.full((3, 4), bits, dtype=torch.uint16).view(HALF)
    y = sparse_linear(x, values, pattern_of(diagonal, diagonal), (4, 4), engine="numba")
    assert torch.equal(y.nan_to_num(7.0), x.nan_to_num(7.0))


def test_values_are_differentiated_in_b_in_any_mode_of_compilation() -> None:
    given = problem((1, 1), HALF, (33, 70))
    x, values, pattern = integers(300, 70, dtype=HALF), given.values, given.pattern

    def loss(values: Tensor, x: Tensor) -> Tensor:
        y = sparse_linear(x, values, pattern, given.shape, engine="numba")
        return y.float().square().sum()

    eager = grad(loss, (0, 1))(values, x)
    assert eager[0][pattern.active_count :].any()
    compiled = torch.compile(grad(loss, (0, 1)), backend="aot_eager")(values, x)
    for one, other in zip(eager, compiled, strict=True):
        assert torch.equal(one, other)


def test_a_compiled_step_is_an_eager_one_and_that_of_float32_to_half_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40))
    config, optimizer = tk.TopKastConfig(0.8, 0.5, penalty_weight=1e-3), tk.sgd(0.1)
    x, ends = torch.randn(96, 48), {}

    def loss(apply: Any, x: Tensor) -> Tensor:
        return apply(x).float().square().mean()

    for dtype, compile in ((torch.float32, False), (HALF, False), (HALF, AOT), (HALF, True)):
        half = model.to(dtype)
        state = tk.init_state(half, config, optimizer, seed=0, master=torch.float32)
        step = tk.make_train_step(half, loss, config, optimizer, compile=compile, engine="numba")
        for _ in range(3):
            state, _ = step(state, x.to(dtype))
        ends[dtype, str(compile)] = tk.dense_params(state)
    for name, theta in ends[HALF, str(False)].items():
        torch.testing.assert_close(ends[HALF, str(AOT)][name], theta)
        torch.testing.assert_close(ends[HALF, str(True)][name], theta, rtol=1e-2, atol=1e-4)
        reference = ends[torch.float32, str(False)][name]
        moved = theta - model.state_dict()[name].float()
        assert (theta - reference).abs().max() < 0.02 * reference.abs().max()
        assert moved.any()
