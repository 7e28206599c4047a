"""A sparse linear layer as a function: values, gradients and every way of taking them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from tests.kernels.problems import ON_CPU, Problem, integers, problem
from topkast_func.kernels import pattern_of, sparse_linear

every_engine = pytest.mark.parametrize("engine", ON_CPU)
every_block = pytest.mark.parametrize("block", [(1, 1), (4, 4)])
Gradients = tuple[Tensor, Tensor, Tensor]


def compiled(function: Callable[..., Any], engine: str) -> Callable[..., Any]:
    """Compile as one graph, by inductor for the default engine; the other way costs less."""
    torch.compiler.reset()
    backend = "inductor" if engine == "numba" else "aot_eager"
    return torch.compile(function, fullgraph=True, backend=backend)


class Case:
    """A layer with inputs and bias of small integers, and its loss Σ y²."""

    def __init__(
        self, engine: Any, block: tuple[int, int], dtype: torch.dtype, transposed: bool = False
    ) -> None:
        self.given: Problem = problem(block, dtype)
        self.pattern, self.engine, self.transposed = self.given.pattern, engine, transposed
        outputs, inputs = self.given.shape[::-1] if transposed else self.given.shape
        self.x = integers(6, inputs, dtype=dtype)
        self.bias = integers(outputs, dtype=dtype)
        self.leaves = (self.given.values, self.x, self.bias)

    def __call__(self, values: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return sparse_linear(
            x, values, self.pattern, self.given.shape, bias, self.engine, self.transposed
        )

    def loss(self, values: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return self(values, x, bias).square().sum()

    def gradients(self) -> Gradients:
        """Differentiate a dense layer at α, and gather on B."""
        alpha, x, bias = (t.clone().requires_grad_() for t in (self.given.alpha, self.x, self.bias))
        loss = (x @ (alpha if self.transposed else alpha.T) + bias).square().sum()
        for_alpha, for_x, for_bias = torch.autograd.grad(loss, (alpha, x, bias))
        exploring = self.given.backward & ~self.given.forward
        assert for_alpha[exploring].any()
        return self.given.gathered(for_alpha), for_x, for_bias


@every_engine
def test_values_that_are_negated_when_they_are_read(engine: Any) -> None:
    case = Case(engine, (1, 1), torch.float32)
    values = torch._neg_view(-case.given.values)
    assert values.is_neg()
    assert torch.equal(case(values, case.x), case(case.given.values, case.x))


def by_func(case: Case) -> Gradients:
    return grad(case.loss, argnums=(0, 1, 2))(*case.leaves)


def by_compiled_func(case: Case) -> Gradients:
    return compiled(grad(case.loss, argnums=(0, 1, 2)), case.engine)(*case.leaves)


def by_backward(case: Case) -> Gradients:
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    case.loss(*leaves).backward()  # type: ignore[no-untyped-call]
    found = tuple(leaf.grad for leaf in leaves if leaf.grad is not None)
    assert len(found) == 3
    return found


def by_compiled_backward(case: Case) -> Gradients:
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    compiled(case.loss, case.engine)(*leaves).backward()
    found = tuple(leaf.grad for leaf in leaves if leaf.grad is not None)
    assert len(found) == 3
    return found


@every_engine
@every_block
@pytest.mark.parametrize("way", [by_func, by_compiled_func, by_backward, by_compiled_backward])
def test_the_gradient_is_the_dense_one_at_alpha_on_b(
    way: Callable[[Case], Gradients], engine: str, block: tuple[int, int]
) -> None:
    case = Case(engine, block, torch.float32)
    for found, expected in zip(way(case), case.gradients(), strict=True):
        assert torch.equal(found, expected)


@every_engine
@pytest.mark.parametrize("way", [by_func, by_compiled_func, by_backward, by_compiled_backward])
def test_a_weight_that_is_multiplied_by_as_it_is_has_the_same_gradient(
    way: Callable[[Case], Gradients], engine: str
) -> None:
    case = Case(engine, (4, 1), torch.float32, transposed=True)
    values, x, bias = case.leaves
    assert torch.equal(case(values, x, bias), x @ case.given.alpha + bias)
    for found, expected in zip(way(case), case.gradients(), strict=True):
        assert torch.equal(found, expected)


@every_engine
@every_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_of_any_leading_axes_and_strides(
    engine: str, block: tuple[int, int], dtype: torch.dtype
) -> None:
    case = Case(engine, block, dtype)
    n = case.given.shape[1]
    inputs = [
        integers(n, dtype=dtype),
        integers(2, 3, 4, n, dtype=dtype),
        integers(n, 5, dtype=dtype).T,
        integers(10, 2 * n, dtype=dtype)[::3, ::2],
        integers(1, n, dtype=dtype).expand(4, n),
    ]
    for x in inputs:
        y = case(case.given.values, x, case.bias)
        assert y.dtype == dtype
        assert y.shape == (*x.shape[:-1], case.given.shape[0])
        assert torch.equal(y, x @ case.given.alpha.T + case.bias)


@every_engine
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_an_empty_batch_has_an_empty_result_and_a_zero_gradient(
    engine: str, shape: tuple[int, ...]
) -> None:
    case = Case(engine, (1, 1), torch.float32)
    values = case.given.values.requires_grad_()
    y = case(values, torch.ones(*shape, case.given.shape[1]), case.bias)
    assert y.shape == (*shape, case.given.shape[0])
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert not values.grad.any()


@every_engine
def test_one_entry_is_a_layer(engine: Any) -> None:
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[3, 2] = True
    x = integers(4, 7)
    y = sparse_linear(x, torch.tensor([2.0]), pattern_of(mask, mask), (5, 7), engine=engine)
    assert torch.equal(y[:, 3], 2 * x[:, 2])
    assert int(y.count_nonzero()) == 4


# vmap.


@every_engine
@every_block
def test_vmap_over_inputs(engine: str, block: tuple[int, int]) -> None:
    case = Case(engine, block, torch.float32)
    n = case.given.shape[1]
    for x, axis in ((integers(4, n), 0), (integers(4, 3, n), 0), (integers(3, 4, n), 1)):
        found = vmap(lambda x: case(case.given.values, x, case.bias), in_dims=axis)(x)
        expected = x.movedim(axis, 0) @ case.given.alpha.T + case.bias
        assert torch.equal(found, expected)


@every_engine
@every_block
@pytest.mark.parametrize("how", [lambda f, engine: f, compiled], ids=["eager", "compiled"])
def test_gradients_per_sample(how: Any, engine: str, block: tuple[int, int]) -> None:
    case = Case(engine, block, torch.float32)
    per_sample = vmap(grad(case.loss, argnums=(0, 2)), in_dims=(None, 0, None))
    for_values, for_bias = how(per_sample, engine)(case.given.values, case.x, case.bias)
    batch = case.gradients()
    assert torch.equal(for_values.sum(0), batch[0])
    assert torch.equal(for_bias.sum(0), batch[2])
    for row, one in enumerate(for_values):
        y = case.x[row] @ case.given.alpha.T + case.bias
        assert torch.equal(one, case.given.gathered(2 * torch.outer(y, case.x[row])))


@every_engine
@every_block
def test_vmap_over_values(engine: str, block: tuple[int, int]) -> None:
    case = Case(engine, block, torch.float32)
    stacked = torch.stack([case.given.values, 2 * case.given.values])
    found = vmap(case, in_dims=(0, None))(stacked, case.x)
    once = case.x @ case.given.alpha.T
    assert torch.equal(found, torch.stack([once, 2 * once]))
    both = vmap(grad(case.loss, argnums=1), in_dims=(0, 0, None))
    x = torch.stack([case.x, -case.x])
    for i, for_x in enumerate(both(stacked, x, case.bias)):
        alpha = (i + 1) * case.given.alpha
        assert torch.equal(for_x, 2 * (x[i] @ alpha.T + case.bias) @ alpha)


def test_a_jacobian_by_reverse_mode() -> None:
    case = Case("numba", (1, 1), torch.float32)
    found = jacrev(lambda x: case(case.given.values, x))(case.x[0])
    assert torch.equal(found, case.given.alpha)


# Derivatives in numbers.


@every_engine
@every_block
def test_gradcheck(engine: str, block: tuple[int, int]) -> None:
    """Of values only where A is B: elsewhere the gradient is not that of the function."""
    case = Case(engine, block, torch.float64)
    grid = (2, 3)
    case.given = problem(block, torch.float64, grid, densities=(2.0, 2.0))
    case.pattern = case.given.pattern
    x = torch.randn(2, case.given.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(case.given.shape[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(case, (case.given.values.requires_grad_(), x, bias))


@every_engine
@every_block
def test_gradcheck_of_inputs_and_bias(engine: str, block: tuple[int, int]) -> None:
    case = Case(engine, block, torch.float64)
    x = torch.randn(1, case.given.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(case.given.shape[0], dtype=torch.float64, requires_grad=True)
    exploring = case.given.backward & ~case.given.forward
    assert exploring.any()
    run = lambda x, bias: case(case.given.values, x, bias)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, bias))


# Bad input, and autocast.


@pytest.mark.parametrize("shape", [(6, 59), (61,), (), (60, 6)])
def test_inputs_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    case = Case("numba", (1, 1), torch.float32)
    with pytest.raises(ValueError, match=r"do not fit a layer of in_features=60"):
        case(case.given.values, torch.ones(shape))


@every_engine
def test_inputs_of_another_dtype_are_refused(engine: str) -> None:
    case = Case(engine, (1, 1), torch.float32)
    with pytest.raises(TypeError, match=r"inputs are torch.float64, the weight is torch.float32"):
        case(case.given.values, case.x.double())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("convert", [Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.to_mkldnn])
@every_engine
def test_inputs_of_another_layout_are_refused(engine: str, convert: Any) -> None:
    case = Case(engine, (1, 1), torch.float32)
    with pytest.raises(TypeError, match=r"inputs of layout .* are not supported, torch.strided"):
        case(case.given.values, convert(case.x))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [torch.float32, torch.float64])
def test_autocast_returns_what_torch_does(values: torch.dtype, cast: torch.dtype) -> None:
    case = Case("auto", (1, 1), values)
    case.x = torch.randn_like(case.x)
    with torch.autocast("cpu", dtype=cast):
        y = case(case.given.values, case.x.to(cast), case.bias)
        result = nn.functional.linear(case.x, case.given.alpha, case.bias).dtype
    assert y.dtype == result
    in_bfloat16 = values == torch.float32 and cast == torch.bfloat16
    product = (case.x.to(cast).to(values) @ case.given.alpha.T).to(cast if in_bfloat16 else values)
    assert torch.equal(y, (product + case.bias.to(product.dtype)).to(result))
