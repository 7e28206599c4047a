"""A forward pass and the penalty read a sparse weight once, and differentiate as though twice."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import mse_loss

import topkast_func as tk
from topkast_func.facade.gathering import Gathering
from topkast_func.facade.sparse_weight import weights_of

CONFIG = tk.TopKastConfig(0.7, 0.4, refresh_every=None, penalty_weight=0.1)


def sparse(block_shape: tuple[int, int] = (1, 1)) -> tuple[Any, tk.Sparsifier]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    config = replace(CONFIG, block_shape=block_shape)
    return model, tk.sparsify(model, config, engine="numba")


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randn(16, n, generator=generator).double() for n in (8, 4))
    return inputs, targets


def loss(model: Any, seed: int) -> Tensor:
    inputs, targets = batch(seed)
    return mse_loss(model(inputs), targets)


def gradients(model: Any) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def apart(model: Any, handle: tk.Sparsifier, seeds: tuple[int, ...] = (0,)) -> list[Tensor]:
    """Return the gradients of losses and as many penalties, none of which reads what others do."""
    model.zero_grad()
    for seed in seeds:
        handle.penalty().backward()  # type: ignore[no-untyped-call]
        loss(model, seed).backward()  # type: ignore[no-untyped-call]
    for module in model:
        for weight in weights_of(module).values():
            weight.gathering = Gathering()
    return gradients(model)


@pytest.mark.parametrize("block_shape", [(1, 1), (2, 2)])
def test_the_sum_has_the_gradients_of_both(block_shape: tuple[int, int]) -> None:
    model, handle = sparse(block_shape)
    expected = apart(model, handle)
    model.zero_grad()
    value = loss(model, 0)
    reads = [weights_of(model[i])["weight"].gathering._last for i in (0, 2)]
    assert all(reads)
    total = value + handle.penalty()
    assert not any(weights_of(model[i])["weight"].gathering._last for i in (0, 2))
    total.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(gradients(model), expected)
    forward, backward = handle.masks()["0.weight"]
    assert model[0].weight.grad[backward & ~forward].any()


def _penalty_after_the_loss(model: Any, handle: tk.Sparsifier) -> None:
    value = loss(model, 0)
    value.backward()  # type: ignore[no-untyped-call]
    handle.penalty().backward()  # type: ignore[no-untyped-call]
    penalty = handle.penalty()
    loss(model, 1).backward()  # type: ignore[no-untyped-call]
    penalty.backward()  # type: ignore[no-untyped-call]


def _two_forward_passes_before_a_penalty(model: Any, handle: tk.Sparsifier) -> None:
    first, second = loss(model, 0), loss(model, 1)
    (first + handle.penalty()).backward()  # type: ignore[no-untyped-call]
    (second + handle.penalty()).backward()  # type: ignore[no-untyped-call]


def _the_last_forward_pass_first(model: Any, handle: tk.Sparsifier) -> None:
    first, second = loss(model, 0), loss(model, 1)
    penalty = handle.penalty()
    second.backward()  # type: ignore[no-untyped-call]
    (first + penalty).backward()  # type: ignore[no-untyped-call]
    handle.penalty().backward()  # type: ignore[no-untyped-call]


def _an_evaluation_in_between(model: Any, handle: tk.Sparsifier) -> None:
    for seed in (0, 1):
        value = loss(model, seed)
        with torch.no_grad():
            loss(model, 2)
        (value + handle.penalty()).backward()  # type: ignore[no-untyped-call]


def _threads(model: Any, handle: tk.Sparsifier) -> None:
    def work(seed: int) -> None:
        (loss(model, seed) + handle.penalty()).backward()  # type: ignore[no-untyped-call]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (0, 1)))


ORDERS = (
    _penalty_after_the_loss,
    _two_forward_passes_before_a_penalty,
    _the_last_forward_pass_first,
    _an_evaluation_in_between,
    _threads,
)


@pytest.mark.parametrize("train", ORDERS)
def test_the_order_of_passes_does_not_matter(train: Callable[..., None]) -> None:
    model, handle = sparse()
    expected = apart(model, handle, (0, 1))
    model.zero_grad()
    train(model, handle)
    torch.testing.assert_close(gradients(model), expected)


def test_what_was_written_after_the_forward_pass_is_read_anew() -> None:
    model, handle = sparse()
    before = handle.penalty().detach()
    loss(model, 0)
    model[0].weight.data.mul_(2)
    doubled = handle.penalty()
    assert doubled > before
    model.zero_grad()
    doubled.backward()  # type: ignore[no-untyped-call]
    forward, _ = handle.masks()["0.weight"]
    theta = model[0].weight
    torch.testing.assert_close(theta.grad[forward], 0.1 * theta.detach()[forward])
    loss(model, 0)
    model[0].weight = nn.Parameter(theta.detach().clone())  # the same numbers, to be trained
    handle.penalty().backward()  # type: ignore[no-untyped-call]
    theta = model[0].weight
    assert theta.grad[forward].all()
    loss(model, 0)
    inverse = [tk.Masks(~m.forward, ~m.forward) for m in handle.masks().values()]
    weights_of(model[0])["weight"].rule = weights_of(model[0])["weight"].rule._replace(
        counts=frozenset({(int(inverse[0].forward.sum()),) * 2})
    )
    weights_of(model[0])["weight"].hold(model[0], inverse[0])
    model.zero_grad()
    handle.penalty().backward()  # type: ignore[no-untyped-call]
    assert not theta.grad[forward].any()
    assert theta.grad[~forward].all()


def test_without_gradients_nothing_is_kept() -> None:
    model, handle = sparse()
    with torch.no_grad():
        loss(model, 0)
        assert handle.penalty() > 0
    assert weights_of(model[0])["weight"].gathering._last is None
    model.requires_grad_(False)
    loss(model, 0)
    assert weights_of(model[0])["weight"].gathering._last is None


def test_what_is_no_parameter_is_not_kept() -> None:
    model, _ = sparse()
    doubled = {"0.weight": model[0].weight * 2}
    torch.func.functional_call(model, doubled, batch(0)[0]).sum().backward()
    assert weights_of(model[0])["weight"].gathering._last is None
    assert model[0].weight.grad.any()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_with_gradients_computes_the_same() -> None:
    model, _ = sparse()
    inputs = batch(0)[0]
    traced: Any = torch.jit.trace(model.eval(), inputs)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(inputs), model(inputs))


def test_second_derivatives_and_tangents_pass_through_it() -> None:
    model, handle = sparse()
    theta = model[0].weight
    direction = torch.randn_like(theta)

    def slope(*, joined: bool) -> Tensor:
        value = loss(model, 0)
        penalty = handle.penalty()
        total = value + penalty if joined else value + handle.penalty()
        (first,) = torch.autograd.grad(total, theta, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), theta)
        return second

    torch.testing.assert_close(slope(joined=True), slope(joined=False))
    dual_numbers: Any = forward_ad
    with dual_numbers.dual_level():
        dual = dual_numbers.make_dual(theta, direction)
        tangents = []
        for _ in range(2):  # the second reads θ anew
            total = torch.func.functional_call(model, {"0.weight": dual}, batch(0)[0]).sum()
            tangents.append(dual_numbers.unpack_dual(total).tangent)
        torch.testing.assert_close(*tangents)
    value = loss(model, 0)
    (first,) = torch.autograd.grad(model(batch(0)[0]).sum(), theta)
    assert value.isfinite()
    torch.testing.assert_close(tangents[0], (first * direction).sum())


def test_transforms_of_a_model_with_its_own_parameters_read_theta_by_themselves() -> None:
    model, _ = sparse()
    inputs = batch(0)[0]
    single = torch.func.jacrev(model)(inputs[0])
    assert single.abs().sum() > 0
    torch.testing.assert_close(torch.func.jacfwd(model)(inputs[0]), single)
    torch.testing.assert_close(torch.func.vmap(model)(inputs), model(inputs))
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(model))(inputs)[0], single)
    pullback: Any = torch.func.vjp(model, inputs)[1]
    (moved,) = pullback(torch.ones(16, 4).double())
    torch.testing.assert_close(moved[0], single.sum(0))
    found: Any = torch.func.vmap(model)(inputs)
    found.sum().backward()
    expected = model[0].weight.grad.clone()
    model.zero_grad()
    model(inputs).sum().backward()
    assert expected.any()
    torch.testing.assert_close(expected, model[0].weight.grad)
