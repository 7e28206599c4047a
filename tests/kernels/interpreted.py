"""The engine "triton" on the CPU, by Triton's interpreter: what `test_triton` runs apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

from tests.kernels.problems import check_products, integers, problem
from tests.kernels.test_derivatives import (
    by_forward_over_reverse,
    by_jvp,
    by_reverse_over_forward,
    dense,
    ours,
)
from tests.kernels.test_linear import (
    Case,
    Gradients,
    by_backward,
    by_compiled_backward,
    by_compiled_func,
    by_func,
)
from topkast_func.kernels import engines, triton_gpu

HALF = torch.float16


def _wide(factor: TensorHandle) -> TensorHandle:
    """Return a factor of a product in bfloat16 in float32: the interpreter multiplies its bits."""
    if factor.dtype.scalar != tl.bfloat16:
        return factor
    return TensorHandle((factor.data.astype("uint32") << 16).view("float32"), tl.float32)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes, _ = engines._RUNS["triton"]
    monkeypatch.setitem(engines._RUNS, "triton", (dtypes, ("cpu",)))
    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *others: dot(self, _wide(a), _wide(b), *others),
    )


@pytest.mark.parametrize(
    ("block", "batch", "dtype"),
    [
        *(((16, 16), 37, dtype) for dtype in (torch.float32, HALF, torch.bfloat16)),
        *(((16, 16), batch, HALF) for batch in (0, 1)),
        ((48, 32), 37, torch.float32),
        ((48, 32), 1, torch.bfloat16),
    ],
)
def test_products_are_exact(block: tuple[int, int], batch: int, dtype: torch.dtype) -> None:
    check_products("triton", problem(block, dtype, grid=(3, 4)), batch)


def test_products_of_a_matrix_of_several_panels() -> None:
    wide = problem((16, 16), grid=(3, 160), densities=(0.03, 0.06))
    assert wide.pattern.forward.pointers.shape[0] > 4
    check_products("triton", wide, 3)


def test_large_blocks_are_cut_into_tiles() -> None:
    assert [triton_gpu._tile(side, 128) for side in (16, 48, 64, 256)] == [16, 16, 64, 128]
    check_products("triton", problem((256, 64), grid=(1, 2), densities=(2.0, 2.0)), 2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("way", [by_func, by_compiled_func, by_backward, by_compiled_backward])
def test_the_gradient_is_the_dense_one_at_alpha_on_b(
    way: Callable[[Case], Gradients], transposed: bool
) -> None:
    case = Case("triton", (16, 16), torch.float32, transposed)
    for found, expected in zip(way(case), case.gradients(), strict=True):
        assert torch.equal(found, expected)


def test_inputs_of_any_leading_axes_and_strides() -> None:
    case = Case("triton", (16, 16), torch.float32)
    n = case.given.shape[1]
    for x in (integers(n), integers(2, 3, n), integers(n, 5).T, integers(4, 2 * n)[::2, ::2]):
        y = case(case.given.values, x, case.bias)
        assert torch.equal(y, x @ case.given.alpha.T + case.bias)


def test_gradients_per_sample() -> None:
    case = Case("triton", (16, 16), torch.float32)
    per_sample = vmap(grad(case.loss, argnums=(0, 1)), in_dims=(None, 0, None))
    for_values, for_x = per_sample(case.given.values, case.x, case.bias)
    expected = case.gradients()
    assert torch.equal(for_values.sum(0), expected[0])
    assert torch.equal(for_x, expected[1])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_bias_is_added_before_sums_are_rounded(transposed: bool) -> None:
    case = Case("triton", (16, 16), HALF, transposed)
    alpha = case.given.alpha if transposed else case.given.alpha.T
    bias, x = integers(2 * alpha.shape[1], dtype=HALF)[::2], 37 * case.x
    exact = (x.double() @ alpha.double()).to(HALF), (x.double() @ alpha.double() + bias).to(HALF)
    assert not torch.equal(exact[0] + bias, exact[1])
    assert torch.equal(case(case.given.values, x, bias), exact[1])


def test_a_bias_of_another_dtype_is_added_as_torch_adds_it() -> None:
    case = Case("triton", (16, 16), HALF)
    y = case(case.given.values, case.x, case.bias.float())
    assert y.dtype == torch.float32
    assert torch.equal(y, case(case.given.values, case.x, case.bias).float())


@pytest.mark.parametrize("dims", [(None, None, 0), (None, 0, 0), (0, 1, 0), (None, 0, None)])
def test_biases_per_sample(dims: tuple[int | None, ...]) -> None:
    case = Case("triton", (16, 16), torch.float32)
    leaves = [
        leaf if dim is None else torch.stack((leaf, -leaf, 2 * leaf), dim)
        for leaf, dim in zip(case.leaves, dims, strict=True)
    ]
    of_loss = grad(case.loss, argnums=(0, 1, 2))
    for function in (case, of_loss):
        found = tree_leaves(vmap(function, in_dims=dims)(*leaves))
        for i in range(3):
            pairs = zip(leaves, dims, strict=True)
            one = [leaf if dim is None else leaf.select(dim, i) for leaf, dim in pairs]
            assert all(map(torch.equal, (f[i] for f in found), tree_leaves(function(*one))))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("way", [by_jvp, by_forward_over_reverse, by_reverse_over_forward])
def test_other_derivatives_are_those_of_a_dense_layer(
    way: Callable[..., Any], transposed: bool
) -> None:
    case = Case("triton", (16, 16), torch.float32, transposed)
    case.leaves = (case.given.values / 64, case.x / 64, case.bias)
    torch.testing.assert_close(way(ours(case), *case.leaves), way(dense(case), *case.leaves))


def test_the_same_call_has_the_same_result() -> None:
    case = Case("triton", (16, 16), torch.float32)
    x = torch.randn(40, case.given.shape[1])
    assert torch.equal(case(case.given.values, x), case(case.given.values, x))


class Launches:
    """Stands in for a kernel, and notes of what size a grid would be."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: Callable[[dict[str, int]], tuple[int, ...]]) -> Any:
        self.grids.append(grid({"BATCH": 64}))
        return lambda *_: None


def test_a_batch_of_millions_of_rows_fits_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_gpu, "_rows", launches := Launches())
    given = problem((16, 16), grid=(3, 4))
    triton_gpu.forward(given.values, torch.empty(2**23, 64, device="meta"), given.pattern, 48)
    assert launches.grids == [(3 * 2**17,)]


def test_all_ways_of_a_kernel_add_in_one_order() -> None:
    assert all(way.kwargs == {} for way in triton_gpu._dots.configs)
    assert {rows >= 64 and warps % 4 == 0 for rows, warps, _ in triton_gpu._ROWS} == {True}
    assert {warps % 4 for warps, _ in triton_gpu._DOTS} == {0}


@pytest.mark.parametrize(
    ("set_precision", "expected"),
    [
        (lambda: None, "ieee"),
        (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), "tf32"),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"), "ieee"),
    ],
)
def test_float32_is_multiplied_as_torch_is_told_to(
    set_precision: Callable[[], None], expected: str
) -> None:
    matmul: Any = torch.backends.cuda.matmul
    try:
        set_precision()
        assert triton_gpu._precision(torch.ones(1)) == expected
        check_products("triton", problem((16, 16), grid=(3, 4)), 5)
    finally:
        matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
