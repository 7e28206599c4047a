"""The sparse layer: its sets, its parameter, its optimiser's slots and its storage.

"The seed" is torch_topkast (2021), whose class this is; a test named after a defect of the
seed shows that it did not come along.
"""

import copy
import inspect
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, vmap
from torch.nn.functional import linear, mse_loss
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import reference
from topkast_func import TopKastLinear, testing
from topkast_func.kernels import ENGINES, EngineName, pattern_of

Make = Callable[[Iterable[Tensor]], Optimizer]
Batch = tuple[Tensor, Tensor]

OPTIMIZERS: dict[str, Make] = {
    "sgd": partial(torch.optim.SGD, lr=1.5),
    "momentum": partial(torch.optim.SGD, lr=0.5, momentum=0.9, weight_decay=0.01),
    "nesterov": partial(torch.optim.SGD, lr=0.5, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.05),
    "amsgrad": partial(torch.optim.Adam, lr=0.05, amsgrad=True, foreach=False),
    "adamw": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.05, momentum=0.5, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "adadelta": partial(torch.optim.Adadelta, lr=30.0),
    "adamax": partial(torch.optim.Adamax, lr=0.05),
    "nadam": partial(torch.optim.NAdam, lr=0.05),
    "radam": partial(torch.optim.RAdam, lr=0.5),
    "rprop": partial(torch.optim.Rprop, lr=0.05),
    "asgd": partial(torch.optim.ASGD, lr=1.5),
}


def _layer(**options: Any) -> TopKastLinear:
    defaults: dict[str, Any] = {"p_forward": 0.6, "p_backward": 0.3}
    return TopKastLinear(6, 5, **{**defaults, **options})


def _batches(count: int, dtype: torch.dtype = torch.float32) -> list[Batch]:
    return [(torch.randn(7, 6, dtype=dtype), torch.randn(7, 5, dtype=dtype)) for _ in range(count)]


def _step(layer: TopKastLinear, optimizer: Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    mse_loss(layer(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _masks(layer: TopKastLinear) -> tuple[Tensor, Tensor]:
    masks = torch.zeros(2, *layer.theta.shape, dtype=torch.bool)
    masks[0][layer.idx_fwd] = masks[1][layer.idx_bwd] = True
    return masks[0], masks[1]


def _alpha(layer: TopKastLinear) -> Tensor:
    return torch.where(_masks(layer)[0], layer.weight, 0.0)


def _on_b(layer: TopKastLinear, dense: Tensor) -> Tensor:
    return torch.cat((dense[layer.idx_fwd], dense[layer.idx_justbwd]))


def _spread(layer: TopKastLinear, values: Tensor) -> Tensor:
    dense = torch.zeros_like(layer.theta)
    size = len(layer.set_fwd)
    dense[layer.idx_fwd], dense[layer.idx_justbwd] = values[:size], values[size:]
    return dense


def _pattern(layer: TopKastLinear) -> list[Tensor]:
    return tree_leaves(layer.pattern)


def _state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def _assert_same_state(layer: nn.Module, expected: dict[str, Tensor]) -> None:
    assert layer.state_dict().keys() == expected.keys()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def _trained(steps: int = 3) -> tuple[TopKastLinear, Optimizer]:
    layer = _layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3, momentum=0.9)
    for batch in _batches(steps):
        layer.update_active_param_set(optimizer)
        _step(layer, optimizer, batch)
    return layer, optimizer


# --- names ---------------------------------------------------------------------------------


def test_arguments_are_the_seeds() -> None:
    construct = inspect.signature(TopKastLinear).parameters.values()
    assert [(p.name, p.default) for p in construct] == [
        ("in_features", inspect.Parameter.empty),
        ("out_features", inspect.Parameter.empty),
        ("p_forward", inspect.Parameter.empty),
        ("p_backward", inspect.Parameter.empty),
        ("bias", True),
        ("device", None),
        ("dtype", None),
        ("engine", "auto"),  # ours
    ]
    call = inspect.signature(TopKastLinear.forward).parameters
    assert list(call) == ["self", "inputs", "sparse"]
    assert call["sparse"].default is True


def test_attributes_are_the_seeds() -> None:
    layer = _layer()
    assert layer.weight.shape == (5, 6)
    assert layer.bias is not None
    assert layer.bias.shape == (5,)
    assert layer.active_fwd_weights.shape == (21,)
    assert layer.set_fwd == range(12)
    assert layer.set_justbwd == range(12, 21)
    assert torch.equal(layer.active_fwd_weights[layer.set_fwd], layer.weight[layer.idx_fwd])
    assert torch.equal(layer.active_fwd_weights[layer.set_justbwd], layer.weight[layer.idx_justbwd])
    assert repr(layer) == (
        "TopKastLinear(in_features=6, out_features=5, p_forward=0.6, p_backward=0.3, bias=True, "
        "engine='auto')"
    )


def test_weights_are_drawn_as_those_of_a_dense_layer() -> None:
    torch.manual_seed(3)
    layer = _layer()
    torch.manual_seed(3)
    dense = nn.Linear(6, 5)
    assert torch.equal(layer.weight, dense.weight)
    assert layer.bias is not None
    assert torch.equal(layer.bias, dense.bias)


def test_reset_parameters_draws_anew_and_chooses_the_sets() -> None:
    layer = _layer()
    before, kept = layer.weight.clone(), layer.active_fwd_weights
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert layer.active_fwd_weights is kept
    assert torch.equal(
        torch.stack(layer.idx_fwd), torch.stack(layer.compute_mask(layer.weight, 0.6))
    )


# --- sets ----------------------------------------------------------------------------------


@given(testing.weights(), testing.sparsities())
def test_compute_mask_gives_the_indices_of_the_largest(matrix: Tensor, p: float) -> None:
    found = TopKastLinear.compute_mask(matrix, p)
    expected = np.nonzero(reference.top_mask(matrix.double().numpy(), p))
    assert [axis.dtype for axis in found] == [torch.int64] * matrix.ndim
    np.testing.assert_array_equal(torch.stack(found).numpy(), np.stack(expected))


@given(
    testing.weights(testing.shapes(ndim=2), dtypes=(torch.float32, torch.bfloat16)),
    st.tuples(testing.sparsities(), testing.sparsities()).map(sorted),
)
def test_sets_are_exact_nested_and_in_order(theta: Tensor, sparsities: list[float]) -> None:
    p_backward, p_forward = sparsities
    rows, columns = theta.shape
    layer = TopKastLinear(columns, rows, p_forward, p_backward, dtype=theta.dtype)
    layer.weight = theta
    layer.update_active_param_set()
    forward = reference.top_mask(theta.double().numpy(), p_forward)
    backward = reference.top_mask(theta.double().numpy(), p_backward)
    sets = (layer.idx_fwd, layer.idx_bwd, layer.idx_justbwd)
    for found, mask in zip(sets, (forward, backward, backward & ~forward), strict=True):
        np.testing.assert_array_equal(torch.stack(found).numpy(), np.stack(np.nonzero(mask)))
    assert len(layer.set_fwd) == reference.count(p_forward, theta.numel())
    assert len(layer.active_fwd_weights) == reference.count(p_backward, theta.numel())
    assert torch.equal(layer.weight, theta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_defect_08_sets_of_any_size_and_dtype_have_exact_counts(dtype: torch.dtype) -> None:
    n = 2**24 + 1  # torch.quantile, the seed's choice, ends at 2^24 and knows no bfloat16
    matrix = (torch.arange(n) % 3 - 1).to(dtype).view(1, n)
    rows, columns = TopKastLinear.compute_mask(matrix, 0.75)
    k = math.floor(0.25 * n + 0.5)
    assert len(columns) == k
    assert not rows.any()
    tied = (torch.arange(n) % 3 != 1).nonzero().squeeze(1)
    first = tied[testing.tie_key(tied).numpy().argsort()[:k]]
    assert torch.equal(columns, first.sort().values)


def test_defect_08_a_constant_matrix_is_not_dense() -> None:
    layer = _layer()
    layer.weight = torch.ones(5, 6)
    layer.update_active_param_set()
    for found, sparsity, count in ((layer.idx_fwd, 0.6, 12), (layer.idx_bwd, 0.3, 21)):
        expected = np.nonzero(reference.top_mask(np.ones((5, 6)), sparsity))
        np.testing.assert_array_equal(torch.stack(found).numpy(), np.stack(expected))
        assert len(found[0]) == count


# --- forward and gradient ------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_alpha_for_inputs_of_any_shape(lead: tuple[int, ...], bias: bool) -> None:
    layer, inputs = _layer(bias=bias, dtype=torch.float64), torch.randn(*lead, 6).double()
    offset = torch.zeros(5).double() if layer.bias is None else layer.bias
    expected = torch.einsum("...i,oi->...o", inputs, _alpha(layer)) + offset
    assert (layer.bias is not None) == bias
    assert len(list(layer.parameters())) == 1 + bias
    torch.testing.assert_close(layer(inputs), expected)


def test_defect_09_any_layer_goes_into_sequential_and_has_an_input_gradient_in_eval_mode() -> None:
    net = nn.Sequential(_layer(bias=False), nn.ReLU(), TopKastLinear(5, 2, 0.5, 0.5)).eval()
    inputs = torch.randn(2, 3, 6, requires_grad=True)
    output = net(inputs)
    output.sum().backward()
    assert output.shape == (2, 3, 2)
    assert inputs.grad is not None
    assert inputs.grad.any()


def test_dense_forward_uses_all_of_theta_and_trains_nothing() -> None:
    layer, _ = _trained()
    inputs = torch.randn(3, 6, requires_grad=True)
    dense = layer(inputs, sparse=False)
    torch.testing.assert_close(dense, linear(inputs, layer.weight, layer.bias))
    assert not torch.allclose(dense, layer(inputs))
    layer.zero_grad()
    dense.sum().backward()
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, layer.weight.sum(0).expand(3, 6))


def test_gradient_of_the_values_is_the_dense_gradient_at_alpha_on_b() -> None:
    layer, (inputs, target) = _layer(dtype=torch.float64), _batches(1, torch.float64)[0]
    mse_loss(layer(inputs), target).backward()  # type: ignore[no-untyped-call]
    alpha = _alpha(layer).requires_grad_()
    assert layer.bias is not None
    loss = mse_loss(linear(inputs, alpha, layer.bias.detach()), target)
    (dense,) = torch.autograd.grad(loss, alpha)
    assert dense[layer.idx_justbwd].all()
    torch.testing.assert_close(layer.active_fwd_weights.grad, _on_b(layer, dense))


def test_gradcheck_of_inputs_and_bias() -> None:
    layer = _layer(dtype=torch.float64)
    inputs = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, b: functional_call(layer, {"bias": b}, (x,)), (inputs, bias)
    )


def test_gradcheck_of_values_where_a_is_b() -> None:  # elsewhere it must fail: straight-through
    layer = _layer(p_forward=0.5, p_backward=0.5, dtype=torch.float64)
    inputs = torch.randn(3, 6, dtype=torch.float64)
    values = layer.active_fwd_weights.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: functional_call(layer, {"active_fwd_weights": v}, (inputs,)), (values,)
    )


def test_input_gradient_goes_through_a_only() -> None:
    layer, inputs = _layer(), torch.randn(4, 6, requires_grad=True)
    layer(inputs).sum().backward()
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, _alpha(layer).sum(0).expand(4, 6))


class _LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most bytes that any one tensor made under it holds."""

    most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.most = max(self.most, leaf.untyped_storage().nbytes())
        return result


def test_defect_13_no_tensor_of_stored_entries_times_batch_is_made() -> None:
    layer, inputs = TopKastLinear(32, 32, 0.5, 0.25), torch.randn(64, 32, requires_grad=True)
    with _LargestTensor() as largest:  # type: ignore[no-untyped-call]
        layer(inputs).sum().backward()
    assert 0 < largest.most <= 4 * 64 * 32  # the seed made 512 · 64 entries


# --- engines -------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_engine_gives_the_output_and_gradients_of_the_dense_twin(
    engine: EngineName, dtype: torch.dtype
) -> None:
    layer = TopKastLinear(40, 24, 0.9, 0.7, dtype=dtype, engine=engine)
    inputs = torch.randn(3, 7, 40, dtype=dtype, requires_grad=True)
    twin, offset = _alpha(layer).requires_grad_(), torch.zeros(24, dtype=dtype, requires_grad=True)
    assert layer.bias is not None
    expected = linear(inputs, twin, offset + layer.bias.detach())
    torch.testing.assert_close(found := layer(inputs), expected)
    target = torch.randn(3, 7, 24, dtype=dtype)
    (of_input,) = torch.autograd.grad(mse_loss(found, target), inputs, retain_graph=True)
    mse_loss(found, target).backward()  # type: ignore[no-untyped-call]
    wanted = torch.autograd.grad(mse_loss(expected, target), (inputs, twin, offset))
    assert _on_b(layer, wanted[1])[layer.set_justbwd].all()
    torch.testing.assert_close(of_input, wanted[0])
    torch.testing.assert_close(layer.active_fwd_weights.grad, _on_b(layer, wanted[1]))
    torch.testing.assert_close(layer.bias.grad, wanted[2])


def test_half_precision_computes_with_the_engine_that_supports_it() -> None:
    layer, inputs = _layer(bias=False, dtype=torch.bfloat16), torch.randn(4, 6).bfloat16()
    output = layer(inputs)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, linear(inputs, _alpha(layer)))
    output.sum().backward()
    assert layer.active_fwd_weights.grad is not None
    assert layer.active_fwd_weights.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "cuda"}, ValueError, "engine must be 'auto' or one of .*, got 'cuda'"),
        ({"engine": "numba", "dtype": torch.bfloat16}, TypeError, "float32 and torch.float64"),
    ],
)
def test_an_engine_that_cannot_compute_is_refused_when_the_layer_is_made(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _layer(**options)


def _most_bytes(engine: EngineName) -> int:
    layer, inputs = TopKastLinear(256, 128, 0.9, 0.8, engine=engine), torch.randn(4, 256)
    inputs.requires_grad_()
    layer(inputs).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        layer(inputs).sum().backward()
    return max(event.self_cpu_memory_usage for event in made.events())


def test_no_dense_weight_is_made() -> None:
    assert _most_bytes("dense") >= 4 * 256 * 128  # so that the profiler would have seen it
    assert 0 < _most_bytes("numba") < 4 * 256 * 128 // 4


def test_what_is_kept_for_the_gradient_is_no_dense_weight() -> None:
    layer, kept = TopKastLinear(256, 128, 0.9, 0.8), list[Tensor]()

    def keep(tensor: Tensor) -> int:
        kept.append(tensor)
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(keep, kept.__getitem__):
        layer(torch.randn(4, 256))
    assert kept
    assert max(tensor.numel() for tensor in kept) < 256 * 128 // 4


def test_the_pattern_follows_a_refresh_in_place() -> None:
    layer = _layer(bias=False)
    index = _pattern(layer)
    places, before = [tensor.data_ptr() for tensor in index], [tensor.clone() for tensor in index]
    _swap(layer)
    layer.update_active_param_set()
    assert [tensor.data_ptr() for tensor in _pattern(layer)] == places
    assert not all(map(torch.equal, _pattern(layer), before))
    expected = tree_leaves(pattern_of(*_masks(layer)))
    assert all(map(torch.equal, _pattern(layer), expected))
    torch.testing.assert_close(layer(torch.eye(6)), _alpha(layer).T)


# --- transformations -----------------------------------------------------------------------


def _net() -> nn.Sequential:
    return nn.Sequential(
        TopKastLinear(32, 24, 0.8, 0.5, engine="numba"), nn.ReLU(), TopKastLinear(24, 5, 0.5, 0.2)
    )


def _gradients(call: Callable[[Tensor], Tensor], net: nn.Module, inputs: Tensor) -> list[Tensor]:
    inputs = inputs.clone().requires_grad_()
    loss = call(inputs).square().sum()
    return [loss.detach(), *torch.autograd.grad(loss, (*net.parameters(), inputs))]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_net_equals_the_eager_one_through_refreshes_in_one_graph(backend: str) -> None:
    torch.compiler.reset()
    counter, net = CompileCounterWithBackend(backend), _net()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for _ in range(4):
        inputs = torch.randn(16, 32)
        found, expected = (_gradients(call, net, inputs) for call in (compiled, net))
        first = net[0]
        assert isinstance(first, TopKastLinear)
        assert expected[1][first.set_justbwd].any()
        torch.testing.assert_close(found, expected)
        with torch.no_grad():
            first.active_fwd_weights.add_(torch.randn_like(first.active_fwd_weights))
        first.update_active_param_set()
    assert counter.frame_count == 1


def test_a_compiled_net_takes_batches_of_other_sizes() -> None:
    torch.compiler.reset()
    net = _net()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for size in (16, 7, 9):
        inputs = torch.randn(size, 32)
        torch.testing.assert_close(_gradients(compiled, net, inputs), _gradients(net, net, inputs))


def test_gradients_per_example_and_per_network_are_those_of_each_alone() -> None:
    layer = TopKastLinear(12, 8, 0.8, 0.5, dtype=torch.float64, engine="numba")
    inputs = torch.randn(3, 4, 12, dtype=torch.float64)
    values = torch.randn(3, *layer.active_fwd_weights.shape, dtype=torch.float64)

    def loss(values: Tensor, inputs: Tensor) -> Tensor:
        return functional_call(layer, {"active_fwd_weights": values}, (inputs,)).square().sum()

    gradient = torch.func.grad(loss)
    for stacked, dim in ((values, 0), (values[0], None)):
        found = vmap(gradient, in_dims=(dim, 0))(stacked, inputs)
        each = stacked if dim == 0 else [stacked] * 3
        alone = [gradient(v, x) for v, x in zip(each, inputs, strict=True)]
        assert found[:, layer.set_justbwd].any()
        torch.testing.assert_close(found, torch.stack(alone))


# --- optimisers through refreshes ----------------------------------------------------------


def _dense_run(
    theta: Tensor, make: Make, batches: list[Batch], refresh_at: set[int]
) -> list[Tensor]:
    """Oracle: θ and its slots dense, both put back to rest outside B after every step."""
    theta = nn.Parameter(theta.clone())
    optimizer = make([theta])
    trajectory, entered = [theta.detach().clone()], 0
    backward = torch.ones_like(theta, dtype=torch.bool)
    for t, (inputs, target) in enumerate(batches):
        if t == 0 or t in refresh_at:
            before, (forward, backward) = backward, _oracle_masks(theta)
            entered += int((backward & ~before).sum())
            _clear(optimizer, theta, ~backward)
        alpha = torch.where(forward, theta.detach(), 0.0).requires_grad_()
        (gradient,) = torch.autograd.grad(mse_loss(linear(inputs, alpha), target), alpha)
        theta.grad = torch.where(backward, gradient, 0.0)
        optimizer.step()
        _clear(optimizer, theta, ~backward)
        theta.data = torch.where(backward, theta.data, trajectory[-1])
        trajectory.append(theta.detach().clone())
    assert entered > 2
    return trajectory


def _oracle_masks(theta: Tensor) -> tuple[Tensor, Tensor]:
    weights = theta.detach().numpy()
    forward, backward = (reference.top_mask(weights, sparsity) for sparsity in (0.6, 0.3))
    return torch.from_numpy(forward), torch.from_numpy(backward)


def _clear(optimizer: Optimizer, theta: Tensor, rest: Tensor) -> None:
    for slot in optimizer.state[theta].values():
        if isinstance(slot, Tensor) and slot.shape == theta.shape:
            slot[rest] = 0.0


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_with_any_optimizer_equals_a_dense_oracle_through_refreshes(make: Make) -> None:
    layer = _layer(bias=False, dtype=torch.float64)
    batches = _batches(12, torch.float64)
    expected = _dense_run(layer.weight, make, batches, {3, 6, 9})
    optimizer, parameter = make(layer.parameters()), layer.active_fwd_weights
    found = [layer.weight.clone()]
    for t, batch in enumerate(batches):
        if t in {3, 6, 9}:
            layer.update_active_param_set(optimizer)
        _step(layer, optimizer, batch)
        found.append(layer.weight.clone())
        rest = ~_masks(layer)[1]
        assert torch.equal(found[t + 1][rest], found[t][rest])
    assert layer.active_fwd_weights is parameter
    for t in range(len(batches)):
        torch.testing.assert_close(found[t + 1] - found[t], expected[t + 1] - expected[t])
        assert not torch.equal(found[t + 1], found[t])


def _swap(layer: TopKastLinear) -> None:
    """Bring C into A and a part of A out of B."""
    layer.weight = torch.where(_masks(layer)[1], layer.weight, 5.0)


def test_defect_02_slots_follow_their_weight_and_new_entries_start_at_zero() -> None:
    layer = _layer()
    optimizer = torch.optim.Adam(layer.parameters())
    for batch in _batches(3):
        _step(layer, optimizer, batch)
    slots = optimizer.state[layer.active_fwd_weights]
    before = {name: _spread(layer, slots[name]) for name in ("exp_avg", "exp_avg_sq")}
    assert all(slots[name].all() for name in before)
    old = _masks(layer)[1]
    _swap(layer)
    layer.update_active_param_set(optimizer)
    new = _masks(layer)[1]
    assert (new & ~old).sum() == 9
    for name, dense in before.items():
        assert torch.equal(_spread(layer, slots[name]), torch.where(old & new, dense, 0.0))
    assert slots["step"] == 3


def test_gradient_follows_its_weight_through_a_refresh() -> None:
    layer = _layer()
    layer(torch.randn(4, 6)).square().sum().backward()
    gradient = layer.active_fwd_weights.grad
    assert gradient is not None
    before, old = _spread(layer, gradient), _masks(layer)[1]
    _swap(layer)
    layer.update_active_param_set()
    assert torch.equal(_spread(layer, gradient), torch.where(old & _masks(layer)[1], before, 0.0))


def test_defect_04_a_refresh_keeps_the_updates_on_the_exploration_set() -> None:
    layer = _layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    exploring, before = layer.idx_justbwd, layer.weight.clone()
    _step(layer, optimizer, _batches(1)[0])
    moved = layer.active_fwd_weights.detach()[layer.set_justbwd]
    layer.update_active_param_set()  # the seed needed reset_justbwd_weights() first
    assert torch.equal(layer.weight[exploring], moved)
    assert not (moved == before[exploring]).any()


def test_reset_justbwd_weights_changes_nothing() -> None:
    layer, _ = _trained()
    inputs = torch.randn(2, 6)
    before, output = _state(copy.deepcopy(layer)), layer(inputs)
    layer.reset_justbwd_weights()
    _assert_same_state(layer, before)
    assert torch.equal(layer(inputs), output)


def test_a_frozen_layer_keeps_its_values_through_refreshes() -> None:
    layer = _layer()
    before = layer.weight.clone()
    for _ in range(3):
        layer.update_active_param_set()
    assert torch.equal(layer.weight, before)


# --- storage -------------------------------------------------------------------------------


def test_defect_05_state_dict_gives_equal_outputs_after_training() -> None:
    layer, _ = _trained()
    other = _layer()
    inputs = torch.randn(4, 6)
    assert not torch.equal(other(inputs), layer(inputs))
    saved = _state(layer)
    assert torch.equal(saved["theta"], layer.weight)
    other.load_state_dict(saved)
    assert torch.equal(other(inputs), layer(inputs))
    assert torch.equal(other(inputs, sparse=False), layer(inputs, sparse=False))
    assert all(map(torch.equal, other.idx_bwd, layer.idx_bwd))
    assert all(map(torch.equal, other.idx_justbwd, layer.idx_justbwd))


def test_defect_05_to_moves_everything() -> None:
    layer = _layer().to("meta")
    tensors = (*layer.parameters(), *layer.buffers(), *layer.idx_fwd)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_run_resumed_from_state_dicts_equals_the_uninterrupted_one() -> None:
    layer, optimizer = _trained()
    saved = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))
    other = _layer()
    resumed = torch.optim.SGD(other.parameters(), lr=1.0, momentum=0.9)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for batch in _batches(3):
        for network, optim in ((layer, optimizer), (other, resumed)):
            network.update_active_param_set(optim)
            _step(network, optim, batch)
    _assert_same_state(other, _state(layer))


def test_slots_follow_in_a_loop_that_does_not_name_the_optimizer() -> None:
    ends = []
    for named in (True, False):
        torch.manual_seed(0)
        layer, bystander = _layer(), nn.Linear(2, 2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
        other = torch.optim.SGD(bystander.parameters(), lr=0.5, momentum=0.9)
        x = torch.randn(16, layer.in_features)
        for step in range(12):
            optimizer.zero_grad()
            (layer(x).square().mean() + bystander(x[:, :2]).mean()).backward()
            optimizer.step()
            other.step()
            if step % 3 == 2:
                layer.update_active_param_set(*([optimizer] if named else []))
        ends.append((layer.weight.clone(), optimizer.state[layer.active_fwd_weights]))
    assert torch.equal(ends[0][0], ends[1][0])
    slots = [end[1]["momentum_buffer"] for end in ends]
    assert torch.equal(*slots)
    assert slots[0].any()


def test_a_flat_weight_can_be_assigned() -> None:
    layer = _layer()
    flat = torch.randn(layer.theta.numel())
    layer.weight = flat
    assert torch.equal(layer.weight, flat.view(layer.theta.shape))


def test_state_dict_holds_the_positions_and_not_the_pattern() -> None:
    layer, _ = _trained()
    state = layer.state_dict()
    assert list(state) == [
        "active_fwd_weights",
        "bias",
        "theta",
        "positions_fwd",
        "positions_justbwd",
    ]
    for name, index in (("positions_fwd", layer.idx_fwd), ("positions_justbwd", layer.idx_justbwd)):
        assert state[name].dtype == torch.int64
        assert torch.equal(state[name], 6 * index[0] + index[1])


def test_a_state_dict_of_the_first_release_loads() -> None:  # it had the positions as buffers
    layer, theta = _layer(bias=False), torch.arange(30.0).view(5, 6)
    forward, exploring = torch.arange(18, 30), torch.arange(3, 12)
    values = theta.flatten()[torch.cat((forward, exploring))]
    layer.load_state_dict({
        "theta": theta,
        "positions_fwd": forward,
        "positions_justbwd": exploring,
        "active_fwd_weights": values,
    })
    assert torch.equal(layer.positions, torch.cat((forward, exploring)))
    assert torch.equal(layer.active_fwd_weights, values)
    alpha = torch.where(torch.arange(30).view(5, 6) >= 18, theta, 0.0)
    torch.testing.assert_close(layer(torch.eye(6)), alpha.T)


@pytest.mark.parametrize("refresh", [False, True])
def test_a_state_dict_is_what_the_layer_was_whatever_is_trained_after(refresh: bool) -> None:
    layer = _layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    saved, x = layer.state_dict(), torch.randn(4, 6)
    expected = layer(x).detach()
    for batch in _batches(3):
        _step(layer, optimizer, batch)
    if refresh:
        _swap(layer)
        layer.update_active_param_set()
    assert not torch.allclose(layer(x), expected)
    other = _layer()
    for loaded in (other, layer):
        loaded.load_state_dict(saved)
        torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)
    kept = layer.state_dict(keep_vars=True)
    assert kept["active_fwd_weights"] is layer.active_fwd_weights


FRESH = """
import sys, torch
layer = torch.load(sys.argv[1], weights_only=False)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
for _ in range(2):
    layer(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
slot = optimizer.state[layer.active_fwd_weights]["momentum_buffer"]
dense = torch.zeros(30).index_put((layer.positions,), slot.clone())
layer.weight = layer.weight.flip(0)
layer.update_active_param_set()
old = dense != 0
assert not torch.equal(slot, dense[old])
assert torch.equal(slot, dense[layer.positions])
"""


def test_slots_follow_in_a_process_that_only_loads_a_layer(tmp_path: Path) -> None:
    torch.save(_layer(), tmp_path / "layer.pt")
    subprocess.run([sys.executable, "-c", FRESH, tmp_path / "layer.pt"], check=True)


def test_a_state_dict_goes_through_a_file(tmp_path: Path) -> None:
    layer, _ = _trained()
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other = _layer()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    _assert_same_state(other, _state(layer))
    assert all(map(torch.equal, _pattern(other), _pattern(layer)))


def test_a_state_dict_is_assigned_to_a_layer_without_data() -> None:
    layer, _ = _trained()
    other = _layer().to("meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    inputs = torch.randn(4, 6)
    assert torch.equal(other(inputs), layer(inputs))


def test_a_state_dict_without_positions_is_refused() -> None:
    layer, state = _layer(), _layer().state_dict()
    del state["positions_fwd"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"positions_fwd"'):
        layer.load_state_dict(state)


@pytest.mark.parametrize("damage", [30, 1], ids=["out of range", "twice"])
def test_damaged_positions_are_refused_and_the_pattern_stays(damage: int) -> None:
    net = nn.Sequential(_layer())
    state, layer = net.state_dict(), next(iter(net.children()))
    assert isinstance(layer, TopKastLinear)
    before = [index.clone() for index in _pattern(layer)]
    state["0.positions_fwd"] = torch.full((12,), damage)
    with pytest.raises(RuntimeError, match=r"0\.positions_fwd, 0\.positions_justbwd: "):
        net.load_state_dict(state)
    assert all(map(torch.equal, _pattern(layer), before))


def test_arrange_refuses_a_place_named_twice_and_changes_nothing() -> None:
    layer, _ = _trained()
    before = _state(layer)
    with pytest.raises(ValueError, match="positions must be 21 different places"):
        layer.arrange(torch.tensor([0, *range(20)]))
    _assert_same_state(layer, before)


def test_no_conversion_changes_the_dtype_of_the_pattern() -> None:
    layer = _layer()
    for convert in (layer.double, layer.bfloat16, layer.half, layer.float):
        convert()
        assert {index.dtype for index in _pattern(layer)} == {torch.int32}


def test_state_dict_of_another_size_is_refused() -> None:
    layer, other = _layer(), _layer(p_forward=0.9, p_backward=0.8)
    with pytest.raises(RuntimeError, match=r"size mismatch for active_fwd_weights"):
        layer.load_state_dict(other.state_dict())


def test_state_dict_of_another_forward_sparsity_is_refused() -> None:
    layer, other = _layer(), _layer(p_forward=0.9)
    with pytest.raises(RuntimeError, match="size mismatch for positions_fwd"):
        layer.load_state_dict(other.state_dict())


def test_double_changes_the_dtype_of_everything_and_the_optimizer_goes_on() -> None:
    layer, optimizer = _trained()
    before = layer.weight.clone()
    assert layer.double() is layer
    assert torch.equal(layer.weight, before.double())
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    fresh = torch.optim.SGD(layer.parameters(), lr=0.1)
    assert fresh.param_groups[0]["params"] == optimizer.param_groups[0]["params"]
    _step(layer, fresh, _batches(1, torch.float64)[0])
    assert not torch.equal(layer.weight, before.double())


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deep", "pickle"],
)
def test_a_copy_is_equal_and_its_own(clone: Callable[[TopKastLinear], TopKastLinear]) -> None:
    layer, optimizer = _trained()
    other, inputs = clone(layer), torch.randn(4, 6)
    assert torch.equal(other(inputs), layer(inputs))
    _assert_same_state(other, before := _state(layer))
    _step(layer, optimizer, _batches(1)[0])
    _assert_same_state(other, before)
    _step(other, torch.optim.SGD(other.parameters(), lr=0.1), _batches(1)[0])
    assert not torch.equal(other.weight, before["theta"])


def test_values_written_into_a_copy_are_kept() -> None:
    layer = _layer()
    average = torch.optim.swa_utils.AveragedModel(layer)
    with torch.no_grad():
        layer.active_fwd_weights.fill_(7.0)
    average.update_parameters(layer)  # writes to the copy's parameters before it ever ran
    inputs = torch.randn(4, 6)
    assert torch.equal(average(inputs), layer(inputs))
    (copied,) = (module for module in average.modules() if isinstance(module, TopKastLinear))
    assert copied.active_fwd_weights.detach().eq(7.0).all()


# --- writing to the weight -----------------------------------------------------------------


def _assign(holder: Any) -> None:
    holder.weight = 2 * holder.weight + 1


def _assign_parameter(holder: Any) -> None:
    holder.weight = nn.Parameter(2 * holder.weight + 1)


def _add(holder: Any) -> None:
    holder.weight += 1


def _in_place(holder: Any) -> None:
    holder.weight.mul_(-0.5)


def _one_entry(holder: Any) -> None:
    holder.weight[2] = 3.0


def _initialize(holder: Any) -> None:
    nn.init.constant_(holder.weight, 0.3)


def _data(holder: Any) -> None:
    holder.weight.data.fill_(0.3)


WRITES = (_assign, _assign_parameter, _add, _in_place, _one_entry, _initialize, _data)


def _after(write: Callable[[Any], None], weight: Tensor) -> Tensor:
    write(holder := SimpleNamespace(weight=weight.clone()))
    written: Tensor = holder.weight.detach()
    return written


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("refresh", [False, True])
def test_what_is_written_to_the_weight_is_computed_with(
    write: Callable[[Any], None], refresh: bool
) -> None:
    layer, _ = _trained()
    parameter, expected = layer.active_fwd_weights, _after(write, layer.weight)
    write(layer)
    if refresh:
        layer.update_active_param_set()
    inputs = torch.randn(3, 6)
    output = layer(inputs)
    assert torch.equal(layer.weight, expected)
    torch.testing.assert_close(
        output, linear(inputs, torch.where(_masks(layer)[0], expected, 0.0), layer.bias)
    )
    assert layer.active_fwd_weights is parameter
    assert torch.equal(parameter, _on_b(layer, expected))


@pytest.mark.parametrize("write", WRITES)
def test_steps_after_a_write_start_from_what_was_written(write: Callable[[Any], None]) -> None:
    layer, _ = _trained()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    expected = _after(write, layer.weight)
    write(layer)
    _step(layer, optimizer, _batches(1)[0])
    gradient = layer.active_fwd_weights.grad
    assert gradient is not None
    assert gradient.all()
    torch.testing.assert_close(layer.weight, expected - 0.1 * _spread(layer, gradient))


@pytest.mark.parametrize("write", WRITES)
def test_a_write_between_backward_and_step_keeps_the_step(write: Callable[[Any], None]) -> None:
    layer, _ = _trained()
    layer.zero_grad()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(3, 6)).square().sum().backward()
    expected = _after(write, layer.weight)
    write(layer)
    optimizer.step()
    gradient = layer.active_fwd_weights.grad
    assert gradient is not None
    torch.testing.assert_close(layer.weight, expected - 0.1 * _spread(layer, gradient))


def test_reading_the_weight_loses_no_step() -> None:
    layers = [_layer(), _layer()]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]
    for batch in _batches(4):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            _step(layer, optimizer, batch)
        assert layers[1].weight.any()
        layers[1](batch[0])
    assert torch.equal(layers[0].weight, layers[1].weight)


# --- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["p_forward", "p_backward"])
@pytest.mark.parametrize("value", [1.0, -0.1, math.nan, math.inf])
def test_a_sparsity_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be in \[0\.0, 1\.0\), got {value!r}"):
        _layer(**{field: value})


@pytest.mark.parametrize("field", ["p_forward", "p_backward"])
@pytest.mark.parametrize("value", [True, "0.5", None])
def test_a_sparsity_that_is_no_number_is_refused(field: str, value: object) -> None:
    with pytest.raises(
        TypeError, match=rf"{field} must be a number in \[0\.0, 1\.0\), got {value!r}"
    ):
        _layer(**{field: value})


def test_backward_sparsity_above_forward_is_refused() -> None:
    with pytest.raises(ValueError, match=r"p_backward.* must be in \[0, .*0\.2\], got 0\.5"):
        _layer(p_forward=0.2, p_backward=0.5)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0, 5), ValueError, "in_features must be at least 1, got 0"),
        ((6, -1), ValueError, "out_features must be at least 1, got -1"),
        ((6.0, 5), TypeError, r"in_features must be an integer of at least 1, got 6\.0"),
        ((6, True), TypeError, "out_features must be an integer of at least 1, got True"),
    ],
)
def test_a_size_out_of_range_is_refused(
    sizes: tuple[Any, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TopKastLinear(*sizes, p_forward=0.5, p_backward=0.5)


@pytest.mark.parametrize("p", [1.0, -0.1, math.nan])
def test_compute_mask_refuses_a_sparsity_out_of_range(p: float) -> None:
    with pytest.raises(ValueError, match=r"p must be in \[0\.0, 1\.0\), got"):
        TopKastLinear.compute_mask(torch.ones(2, 2), p)


@pytest.mark.parametrize(
    ("matrix", "error"),
    [
        (torch.tensor([[1.0, math.nan]]), ValueError),
        (torch.empty(0, 3), ValueError),
        (torch.arange(4).view(2, 2), TypeError),
    ],
    ids=["nan", "empty", "integer"],
)
def test_compute_mask_refuses_what_has_no_largest_weights(
    matrix: Tensor, error: type[Exception]
) -> None:
    with pytest.raises(error, match="matrix"):
        TopKastLinear.compute_mask(matrix, 0.5)


def test_a_refresh_at_nan_is_refused_and_changes_nothing() -> None:
    layer, optimizer = _trained()
    layer.weight[1, 1] = math.nan
    sets, slots = torch.stack(layer.idx_bwd), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"params\['weight'\] holds NaN"):
        layer.update_active_param_set(optimizer)
    assert torch.equal(torch.stack(layer.idx_bwd), sets)
    assert optimizer.state_dict()["state"].keys() == slots["state"].keys()
    for key, slot in slots["state"].items():
        assert torch.equal(
            optimizer.state_dict()["state"][key]["momentum_buffer"], slot["momentum_buffer"]
        )


def test_a_weight_of_another_shape_is_refused_and_changes_nothing() -> None:
    layer = _layer()
    before = _state(layer)
    with pytest.raises(ValueError, match=r"weight must have shape \(5, 6\), got \(6, 5\)"):
        layer.weight = torch.ones(6, 5)
    _assert_same_state(layer, before)


def test_inputs_that_do_not_fit_are_refused_and_change_nothing() -> None:
    layer, _ = _trained()
    before = _state(layer)
    with pytest.raises(ValueError, match=r"\(2, 7\) do not fit a layer of in_features=6"):
        layer(torch.ones(2, 7))
    with pytest.raises(TypeError, match=r"inputs are torch.float64, the weight is torch.float32"):
        layer(torch.ones(2, 6).double())
    _assert_same_state(layer, before)
