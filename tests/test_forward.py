"""Values of the forward pass, the gradient on B, and every way of taking it."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from topkast_func import (
    Masks,
    TopKastConfig,
    compute_masks,
    index_masks,
    penalized_loss,
    sparse_forward,
)
from topkast_func.testing import configs, weights

CONFIG = TopKastConfig(forward_sparsity=0.7, backward_sparsity=0.4)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def alpha_of(params: dict[str, Tensor], masks: dict[str, Masks]) -> dict[str, Tensor]:
    return {n: p * masks[n].forward if n in masks else p.clone() for n, p in params.items()}


def gradient_at_alpha(
    model: nn.Module, params: dict[str, Tensor], masks: dict[str, Masks], x: Tensor
) -> dict[str, Tensor]:
    """Differentiate an ordinary dense network at α, then restrict to B."""
    alpha = {n: a.requires_grad_() for n, a in alpha_of(params, masks).items()}
    loss = functional_call(model, alpha, (x,)).square().sum()
    gradients = torch.autograd.grad(loss, list(alpha.values()))
    return {
        name: g * masks[name].backward if name in masks else g
        for name, g in zip(alpha, gradients, strict=True)
    }


def by_func(model: nn.Module, params: Any, masks: Any, x: Tensor) -> dict[str, Tensor]:
    return grad(lambda p: sparse_forward(model, p, masks, x).square().sum())(params)


def by_compiled_func(model: nn.Module, params: Any, masks: Any, x: Tensor) -> dict[str, Tensor]:
    def gradient(params: Any, masks: Any, x: Tensor) -> Any:
        return by_func(model, params, masks, x)

    return torch.compile(gradient, fullgraph=True, backend="aot_eager")(params, masks, x)


def by_inductor(model: nn.Module, params: Any, masks: Any, x: Tensor) -> dict[str, Tensor]:
    gradient = torch.compile(lambda p: by_func(model, p, masks, x), fullgraph=True)
    return gradient(params)


def by_backward(model: nn.Module, params: Any, masks: Any, x: Tensor) -> dict[str, Tensor]:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    sparse_forward(model, leaves, masks, x).square().sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def by_compiled_backward(model: nn.Module, params: Any, masks: Any, x: Tensor) -> dict[str, Tensor]:
    run = torch.compile(
        lambda p: sparse_forward(model, p, masks, x), fullgraph=True, backend="aot_eager"
    )
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    run(leaves).square().sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


WAYS = [by_func, by_compiled_func, by_backward, by_compiled_backward]


@pytest.mark.parametrize("way", [*WAYS, by_inductor])
def test_the_gradient_is_the_dense_one_at_alpha_on_b(way: Callable[..., dict[str, Tensor]]) -> None:
    model, x = network(), torch.randn(5, 6)
    params = params_of(model)
    masks = compute_masks(params, CONFIG)
    expected = gradient_at_alpha(model, params, masks, x)
    for name, sets in masks.items():
        assert expected[name][sets.backward & ~sets.forward].any()
    found = way(model, params, masks, x)
    for name in params:
        torch.testing.assert_close(found[name], expected[name])
    for name, sets in masks.items():
        assert not found[name][~sets.backward].any()


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the products that kernels compute."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function.name().startswith("topkast_func::forward")
        return function(*args, **(kwargs or {}))


def sequence_network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Conv1d(5, 4, 1), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("way", "block"),
    [
        *itertools.product((by_func, by_backward), ((1, 1), (4, 3))),
        *((by_compiled_func, (4, 3)), (by_compiled_backward, (1, 1))),
    ],
)
def test_indexed_sets_give_the_same_gradient(
    way: Callable[..., dict[str, Tensor]], block: tuple[int, int]
) -> None:
    model, x = sequence_network(), torch.randn(7, 5, 6)
    params = params_of(model)
    masks = compute_masks(params, replace(CONFIG, block_shape=block, sparse="0.weight"))
    masks |= compute_masks(params, replace(CONFIG, sparse=["2.weight", "3.weight"]))
    sets = index_masks(model, {"0.weight": masks["0.weight"]}, block)
    sets |= index_masks(model, {n: masks[n] for n in ("2.weight", "3.weight")})
    expected = gradient_at_alpha(model, params, masks, x)
    for name, (_, backward) in masks.items():
        assert expected[name][backward].any()
    found = way(model, params, sets, x)
    for name in params:
        torch.testing.assert_close(found[name], expected[name])


def test_indexed_layers_run_on_the_kernels() -> None:
    model, x = sequence_network(), torch.randn(7, 5, 6)
    params = params_of(model)
    masks = compute_masks(params, CONFIG)
    sets = index_masks(model, masks)
    assert not any(isinstance(indexed, Masks) for indexed in sets.values())
    with Products() as products:  # type: ignore[no-untyped-call]
        dense = sparse_forward(model, params, masks, x)
        assert products.count == 0
        found = sparse_forward(model, params, sets, x)
        assert products.count == 3
    torch.testing.assert_close(found, dense)


class Ensemble(nn.Module):
    """Runs its layer with several multiples of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        def member(scale: Tensor) -> Any:
            return functional_call(self.layer, {"weight": scale * self.layer.weight}, (x,))

        return self.layer(x) + vmap(member)(torch.tensor([1.0, 2.0, 5.0])).square().sum(0)


@pytest.mark.parametrize("way", WAYS)
def test_indexed_layers_compute_with_another_weight_where_they_are_given_one(
    way: Callable[..., dict[str, Tensor]],
) -> None:
    model, x = Ensemble(), torch.randn(5, 6)
    params = params_of(model)
    masks = compute_masks(params, CONFIG)
    expected = gradient_at_alpha(model, params, masks, x)
    found = way(model, params, index_masks(model, masks), x)
    for name in params:
        torch.testing.assert_close(found[name], expected[name])


def test_vmap_over_inputs_of_indexed_layers() -> None:
    model, x = network(), torch.randn(4, 5, 6)
    params = params_of(model)
    masks = compute_masks(params, CONFIG)
    sets = index_masks(model, masks)
    found = vmap(lambda x: by_func(model, params, sets, x))(x)
    for i, one in enumerate(x):
        expected = gradient_at_alpha(model, params, masks, one)
        for name in params:
            torch.testing.assert_close(found[name][i], expected[name])


def test_sets_are_not_indexed_where_vmap_hides_them() -> None:
    model = network()
    masks = compute_masks(params_of(model), CONFIG)

    def index(forward: Tensor) -> Tensor:
        index_masks(model, {"0.weight": masks["0.weight"]._replace(forward=forward)})
        return forward

    with pytest.raises(ValueError, match=r"vmap hide those of masks.*call index_masks outside"):
        vmap(index)(torch.stack([masks["0.weight"].forward] * 2))


def test_forward_mode_needs_no_grad_mode() -> None:
    model, (x, way) = network(), torch.randn(2, 5, 6).unbind(0)
    params = params_of(model)
    masks = compute_masks(params, CONFIG)
    found = []
    for sets in (masks, index_masks(model, masks)):
        with torch.no_grad():
            found += [
                jvp(lambda x, sets=sets: sparse_forward(model, params, sets, x), (x,), (way,))
            ]
    assert found[0][1].count_nonzero()
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("compile", [False, True])
def test_the_penalised_loss_is_the_same_of_indexed_sets(compile: bool) -> None:
    model, batch = network(), torch.randn(5, 6)
    params = params_of(model)
    config = replace(CONFIG, penalty_weight=0.1, block_shape=(1, 2))
    masks = compute_masks(params, config)

    def of(sets: Any) -> dict[str, Tensor]:
        def loss(params: Any) -> Tensor:
            return penalized_loss(
                model, lambda f, x: f(x).square().sum(), params, sets, batch, config
            )

        return grad(loss)(params)

    found = torch.compile(of, fullgraph=True, backend="aot_eager") if compile else of
    for name, expected in of(masks).items():
        torch.testing.assert_close(found(index_masks(model, masks, (1, 2)))[name], expected)


@pytest.mark.parametrize("block", [(2, 1), (1, 2), (3, 1), (1, 4)])
def test_sets_that_are_not_of_whole_blocks_are_not_indexed(block: tuple[int, int]) -> None:
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match="the sets of 'weight' are not made of blocks of"):
        index_masks(nn.Linear(2, 2), {"weight": Masks(mask, mask)}, block)


@given(weights(dtypes=(torch.float64, torch.float32)), configs())
def test_alpha_is_theta_on_a_and_zero_elsewhere(theta: Tensor, config: TopKastConfig) -> None:
    params = {"weight": theta}
    masks = compute_masks(params, config)
    alpha = sparse_forward(lambda p: p["weight"], params, masks)
    assert torch.equal(alpha, torch.where(masks["weight"].forward, theta, 0.0))


def test_input_gradient_sees_a_only() -> None:
    theta = {"weight": torch.tensor([[3.0, 2.0, 1.0]])}
    masks = {"weight": Masks(torch.tensor([[1, 0, 0]]).bool(), torch.tensor([[1, 1, 0]]).bool())}
    x = torch.ones(1, 3, requires_grad=True)
    sparse_forward(lambda p, x: x @ p["weight"].T, theta, masks, x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[3.0, 0.0, 0.0]]


def test_gradcheck_where_a_is_b() -> None:
    theta = torch.randn(3, 4, dtype=torch.float64)
    mask = compute_masks({"weight": theta}, TopKastConfig(0.5, 0.5))["weight"]
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def run(values: Tensor, x: Tensor) -> Any:
        full = torch.zeros(3, 4, dtype=torch.float64).masked_scatter(mask.backward, values)
        return sparse_forward(lambda p, x: x @ p["weight"].T, {"weight": full}, {"weight": mask}, x)

    values = theta[mask.backward].requires_grad_()
    assert torch.autograd.gradcheck(run, (values, x))


def by_jvp(loss: Any, *leaves: Any) -> Any:
    return jvp(loss, leaves, tree_map(torch.cos, leaves))[1]


def by_jacfwd(loss: Any, *leaves: Any) -> Any:
    return jacfwd(loss, (0, 1))(*leaves)


def by_hessian(loss: Any, *leaves: Any) -> Any:
    return hessian(loss, (0, 1))(*leaves)


def by_two_jacobians(loss: Any, *leaves: Any) -> Any:
    return jacrev(jacrev(loss, (0, 1)), (0, 1))(*leaves)


def smaller_network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh())


DERIVATIVES = (by_jvp, by_jacfwd, by_hessian, by_two_jacobians)


@pytest.mark.parametrize(
    ("way", "indexed", "compile"),
    [
        *itertools.product(DERIVATIVES, (False, True), (False,)),
        *((by_jvp, True, True), (by_jacfwd, False, True), (by_hessian, True, True)),
    ],
)
def test_forward_mode_and_second_derivatives_are_those_at_alpha_on_b(
    way: Callable[..., Any], indexed: bool, compile: bool
) -> None:
    torch.compiler.reset()
    model, x = smaller_network().double(), torch.randn(2, 6).double()
    params = params_of(model)
    masks = compute_masks(params, CONFIG)
    sets: Any = index_masks(model, masks) if indexed else masks
    loss = lambda p, x: sparse_forward(model, p, sets, x).square().sum()  # noqa: E731

    start, alpha = params_of(model), alpha_of(params, masks)

    def dense(params: dict[str, Tensor], x: Tensor) -> Tensor:
        """Run at α, a constant, from which what is in B may be moved."""
        moved = {name: theta - start[name] for name, theta in params.items()}
        kept = {
            n: torch.where(masks[n].backward, d, 0.0) if n in masks else d for n, d in moved.items()
        }
        at = {name: alpha[name] + kept[name] for name in params}
        return functional_call(model, at, (x,)).square().sum()

    expected = way(dense, params, x)
    run: Any = lambda params, x: way(loss, params, x)  # noqa: E731
    if compile:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(run(params, x), expected)
    if way is by_jacfwd:
        forward, backward = masks["0.weight"]
        assert expected[0]["0.weight"][backward & ~forward].any()


def test_vmap_over_parameters_and_over_inputs() -> None:
    model, x = network(), torch.randn(4, 5, 6)
    singles = [params_of(network()) for _ in range(4)]
    masks = [compute_masks(p, CONFIG) for p in singles]
    stacked = {n: torch.stack([p[n] for p in singles]) for n in singles[0]}
    sets = {n: Masks(*(torch.stack([m[n][i] for m in masks]) for i in range(2))) for n in masks[0]}

    def gradient(params: Any, masks: Any, x: Tensor) -> Any:
        return by_func(model, params, masks, x)

    found = vmap(gradient)(stacked, sets, x)
    for i, single in enumerate(singles):
        expected = gradient_at_alpha(model, single, masks[i], x[i])
        for name in single:
            torch.testing.assert_close(found[name][i], expected[name])
    batched = vmap(lambda x: sparse_forward(model, singles[0], masks[0], x))(x)
    torch.testing.assert_close(batched, sparse_forward(model, singles[0], masks[0], x))


def test_autocast_computes_in_bfloat16_with_a_full_precision_gradient_on_b() -> None:
    model, x = network(), torch.randn(5, 6)
    params = params_of(model)
    masks = compute_masks(params, CONFIG)

    def loss(params: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = sparse_forward(model, params, masks, x)
        assert y.dtype == torch.bfloat16
        return y.float().square().sum()

    expected = gradient_at_alpha(model, params, masks, x)
    compiled = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")
    for found in (grad(loss)(params), compiled(params)):
        for name, sets in masks.items():
            assert found[name].dtype == torch.float32
            assert not found[name][~sets.backward].any()
            assert found[name][sets.backward & ~sets.forward].any()
            scale = expected[name].abs().max()  # bfloat16 keeps 8 bits
            assert (found[name] - expected[name]).abs().max() < 0.05 * scale


def test_the_module_is_not_written_to() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    params = params_of(model)
    sparse_forward(model, params, compute_masks(params, CONFIG), torch.randn(5, 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_buffers_among_the_parameters_are_read_and_not_written_to() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    params = {**params_of(model), "1.running_mean": torch.full((8,), 5.0)}
    masks = compute_masks(params, CONFIG)
    x = torch.randn(5, 6)
    trained = sparse_forward(model, params, masks, x)
    assert torch.equal(params["1.running_mean"], torch.full((8,), 5.0))
    model.eval()
    shifted = sparse_forward(model, params, masks, x)
    assert not torch.allclose(shifted, sparse_forward(model, params_of(model), masks, x))
    assert trained.shape == shifted.shape


def test_keyword_inputs_reach_the_model() -> None:
    def apply(params: Any, x: Tensor, *, scale: float) -> Tensor:
        return x @ params["weight"].T * scale

    theta = {"weight": torch.eye(2)}
    masks = compute_masks(theta, TopKastConfig(0.5, 0.0))
    x = torch.ones(1, 2)
    assert sparse_forward(apply, theta, masks, x, scale=3.0).tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("0.bias"), r"missing \['0.bias'\], unknown \[\]"),
        (lambda p: p.update(extra=p["0.bias"]), r"missing \[\], unknown \['extra'\]"),
    ],
)
def test_a_missing_or_unknown_key_is_named(change: Callable[[Any], Any], message: str) -> None:
    model = network()
    params = params_of(model)
    masks = compute_masks(params, CONFIG)
    change(params)
    with pytest.raises(ValueError, match=message):
        sparse_forward(model, params, masks, torch.randn(5, 6))


def test_masks_of_no_parameter_are_named() -> None:
    masks = {"other": Masks(torch.ones(2, 2).bool(), torch.ones(2, 2).bool())}
    with pytest.raises(ValueError, match=r"masks of unknown parameters: \['other'\]"):
        sparse_forward(lambda p: p["weight"], {"weight": torch.ones(2, 2)}, masks)


def test_a_model_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be a module or a function, got str"):
        sparse_forward("model", {"weight": torch.ones(2, 2)}, {})  # type: ignore[arg-type]


MASK = torch.ones(2, 2).bool()


@pytest.mark.parametrize(
    ("sets", "error", "message"),
    [
        ((MASK, MASK), TypeError, r"masks\['weight'\] must be Masks, .* got tuple"),
        (MASK, TypeError, r"masks\['weight'\] must be Masks, .* got Tensor"),
        (Masks(MASK, MASK.float()), TypeError, "must be of torch.bool, got torch.float32"),
        (Masks(MASK[0], MASK), ValueError, r"has shape \(2,\), the parameter \(2, 2\)"),
        (
            index_masks(nn.Linear(4, 1), {"weight": Masks(MASK.view(1, 4), MASK.view(1, 4))})[
                "weight"
            ],
            ValueError,
            r"are indexed for shape \(1, 4\), not \(2, 2\)",
        ),
    ],
)
def test_masks_that_are_none_of_this_parameter_are_refused(
    sets: Any, error: type[Exception], message: str
) -> None:
    model, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    with pytest.raises(error, match=message):
        sparse_forward(model, params_of(model), {"weight": sets}, x)
    with pytest.raises(error, match=message):
        penalized_loss(
            model, lambda f, x: f(x).sum(), params_of(model), {"weight": sets}, x, CONFIG
        )


@pytest.mark.parametrize(
    ("sets", "block", "error", "message"),
    [
        ((MASK, MASK), (1, 1), TypeError, "must be Masks, got tuple"),
        (Masks(MASK.int(), MASK), (1, 1), TypeError, "must be of torch.bool, got torch.int32"),
        (Masks(MASK[:1], MASK[:1]), (1, 1), ValueError, r"has shape \(1, 2\)"),
        (Masks(MASK, MASK), (0, 1), ValueError, "block_shape must be .*, got 0"),
        (Masks(MASK, MASK), 4, TypeError, "block_shape must be a pair"),
    ],
)
def test_what_cannot_be_indexed_is_refused(
    sets: Any, block: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        index_masks(nn.Linear(2, 2), {"weight": sets}, block)


def test_parameters_that_are_not_by_name_are_refused() -> None:
    with pytest.raises(TypeError, match="params must map names to tensors, got list"):
        sparse_forward(nn.Linear(2, 2), [MASK], {}, torch.ones(1, 2))  # type: ignore[arg-type]
