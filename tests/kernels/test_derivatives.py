"""Forward mode and second derivatives of a sparse layer, by every way that torch has."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from tests.kernels.problems import problem
from tests.kernels.test_linear import Case, compiled, every_engine
from topkast_func.kernels import pattern_of
from topkast_func.model.alpha import straight_through
from topkast_func.types import Masks

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LEAVES = (0, 1, 2)


def case_of(engine: Any, block: tuple[int, int], transposed: bool) -> Case:
    case = Case(engine, block, torch.float64, transposed)
    case.given = problem(block, torch.float64, grid=(3, 4))
    case.pattern = case.given.pattern
    outputs, inputs = case.given.shape[::-1] if transposed else case.given.shape
    case.x, case.bias = torch.randn(2, inputs).double(), torch.randn(outputs).double()
    case.leaves = (case.given.values, case.x, case.bias)
    assert (case.given.backward & ~case.given.forward).any()
    return case


def ours(case: Case) -> Loss:
    return lambda values, x, bias: case(values, x, bias).tanh().square().sum()


def dense(case: Case) -> Loss:
    """The same of a dense α, by the straight-through form of plain torch."""

    def loss(values: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        given = case.given
        flat = torch.zeros_like(given.theta).flatten()
        theta = flat.scatter(0, given.order.flatten(), values.flatten()).view(given.shape)
        alpha = straight_through(theta, Masks(given.forward, given.backward))
        return (x @ (alpha if case.transposed else alpha.T) + bias).tanh().square().sum()

    return loss


def by_jvp(loss: Loss, *leaves: Tensor) -> Any:
    return jvp(loss, leaves, tuple(torch.cos(leaf) for leaf in leaves))[1]


def by_jacfwd(loss: Loss, *leaves: Tensor) -> Any:
    return jacfwd(loss, LEAVES)(*leaves)


def by_dual_numbers(loss: Loss, *leaves: Tensor) -> Any:
    ad: Any = forward_ad
    with ad.dual_level():
        duals = [ad.make_dual(leaf, torch.cos(leaf)) for leaf in leaves]
        return ad.unpack_dual(loss(*duals)).tangent


def by_hessian(loss: Loss, *leaves: Tensor) -> Any:
    return hessian(loss, LEAVES)(*leaves)


def by_two_jacobians(loss: Loss, *leaves: Tensor) -> Any:
    return jacrev(jacrev(loss, LEAVES), LEAVES)(*leaves)


def by_forward_over_reverse(loss: Loss, *leaves: Tensor) -> Any:
    return jvp(grad(loss, LEAVES), leaves, tuple(torch.cos(leaf) for leaf in leaves))[1]


def by_reverse_over_forward(loss: Loss, *leaves: Tensor) -> Any:
    return grad(lambda *leaves: by_jvp(loss, *leaves), LEAVES)(*leaves)


def by_reverse_over_reverse(loss: Loss, *leaves: Tensor) -> Any:
    def once(*leaves: Tensor) -> Tensor:
        return torch.stack([g.square().sum() for g in grad(loss, LEAVES)(*leaves)]).sum()

    return grad(once, LEAVES)(*leaves)


def by_backward_twice(loss: Loss, *leaves: Tensor) -> Any:
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)


def by_third_derivative(loss: Loss, *leaves: Tensor) -> Any:
    return grad(lambda *leaves: by_reverse_over_forward(loss, *leaves)[0].sum(), LEAVES)(*leaves)


def per_sample(loss: Loss, values: Tensor, x: Tensor, bias: Tensor) -> Any:
    one = lambda x: by_forward_over_reverse(loss, values, x, bias)  # noqa: E731
    return vmap(one)(x)


WAYS = [
    by_jvp,
    by_jacfwd,
    by_dual_numbers,
    by_hessian,
    by_two_jacobians,
    by_forward_over_reverse,
    by_reverse_over_forward,
    by_reverse_over_reverse,
    by_backward_twice,
    by_third_derivative,
    per_sample,
]


@every_engine
@pytest.mark.parametrize(("block", "transposed"), [((1, 1), False), ((1, 1), True), ((2, 3), True)])
@pytest.mark.parametrize("way", WAYS)
def test_they_are_those_of_a_dense_layer(
    way: Callable[..., Any], block: tuple[int, int], transposed: bool, engine: str
) -> None:
    case = case_of(engine, block, transposed)
    torch.testing.assert_close(way(ours(case), *case.leaves), way(dense(case), *case.leaves))


COMPILED = [by_jvp, by_forward_over_reverse, by_reverse_over_reverse, by_reverse_over_forward]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("way", COMPILED)
def test_compiled_equals_eager(way: Callable[..., Any], transposed: bool) -> None:
    case = case_of("reference", (1, 1), transposed)
    leaves = case.leaves
    expected = way(ours(case), *leaves)
    if way is not by_jvp:
        exploring = case.given.gathered(case.given.backward & ~case.given.forward)
        assert expected[0][exploring].any()
    found = compiled(lambda *leaves: way(ours(case), *leaves), "reference")(*leaves)
    torch.testing.assert_close(found, expected)


def test_unused_places_take_no_part() -> None:
    case = case_of("reference", (1, 1), transposed=False)
    given, values = case.given, case.given.values
    expected = [way(ours(case), *case.leaves) for way in (by_jvp, by_backward_twice)]
    case.pattern = pattern_of(given.forward, given.backward, exploring=values.shape[0])
    unused = case.pattern.forward.columns.shape[0]
    padded = torch.cat((values, torch.full((unused,), 7.0, dtype=values.dtype)))
    moved, twice = (
        way(ours(case), padded, *case.leaves[1:]) for way in (by_jvp, by_backward_twice)
    )
    torch.testing.assert_close(moved, expected[0])
    torch.testing.assert_close(twice[0][:-unused], expected[1][0])
    assert not twice[0][-unused:].any()
