"""Any optimiser of `torch.optim`: outside B nothing moves, and what enters B has empty slots."""

import copy
import io
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear, mse_loss
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import Optimizer

from tests import reference
from topkast_func import TopKastConfig, TopKastLinear, densify, sparsify, static

Make = Callable[[Iterable[Tensor]], Optimizer]
Batch = tuple[Tensor, Tensor]

OPTIMIZERS: dict[str, Make] = {
    "sgd": partial(torch.optim.SGD, lr=1.5),
    "momentum": partial(torch.optim.SGD, lr=0.5, momentum=0.9, weight_decay=0.01),
    "decayed": partial(torch.optim.SGD, lr=0.5, momentum=0.9, weight_decay=1.0),
    "nesterov": partial(torch.optim.SGD, lr=0.5, momentum=0.9, nesterov=True),
    "sgd_fused": partial(torch.optim.SGD, lr=0.5, momentum=0.9, weight_decay=0.01, fused=True),
    "adam": partial(torch.optim.Adam, lr=0.05, weight_decay=0.1),
    "amsgrad": partial(torch.optim.Adam, lr=0.05, amsgrad=True, foreach=False),
    "adamw": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
    "adamw_foreach": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1, foreach=True),
    "adam_fused": partial(torch.optim.Adam, lr=0.05, amsgrad=True, fused=True),
    "adam_tensor": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.05), foreach=False),
    "adamw_fused": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.05, momentum=0.5, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "adagrad_begun": partial(torch.optim.Adagrad, lr=0.3, initial_accumulator_value=0.5),
    "adagrad_fused": partial(torch.optim.Adagrad, lr=0.1, fused=True),
    "adadelta": partial(torch.optim.Adadelta, lr=30.0),
    "adamax": partial(torch.optim.Adamax, lr=0.05),
    "nadam": partial(torch.optim.NAdam, lr=0.05),
    "radam": partial(torch.optim.RAdam, lr=0.5),
    "rprop": partial(torch.optim.Rprop, lr=0.05),
    "asgd": partial(torch.optim.ASGD, lr=1.5),
    "adafactor": partial(torch.optim.Adafactor, lr=1.0, weight_decay=0.1),
}
ROUNDING = {"muon": partial(torch.optim.Muon, lr=0.1, weight_decay=0.1)}
"""Optimisers that compute in bfloat16, whatever the weight is: equal to no oracle."""


def _layer(**options: Any) -> TopKastLinear:
    return TopKastLinear(6, 5, 0.6, 0.3, **options)


def _batches(count: int, dtype: torch.dtype = torch.float32) -> list[Batch]:
    return [(torch.randn(7, 6, dtype=dtype), torch.randn(7, 5, dtype=dtype)) for _ in range(count)]


def _step(layer: nn.Module, optimizer: Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    mse_loss(layer(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _dense_run(
    theta: Tensor, make: Make, batches: list[Batch], refresh_at: set[int]
) -> list[Tensor]:
    """Oracle: θ and its slots dense, both put back to rest outside B after every step."""
    theta = nn.Parameter(theta.detach().clone())
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
    for name, slot in optimizer.state[theta].items():
        if isinstance(slot, Tensor) and slot.shape == theta.shape:
            slot[rest] = _fresh(optimizer, name)


def _fresh(optimizer: Optimizer, name: str) -> float:
    """Return what the slot of a parameter that is given to the optimiser anew holds."""
    kind, group = type(optimizer), optimizer.param_groups[0]
    if kind is torch.optim.Rprop:
        return float(group["lr"]) if name == "step_size" else 0.0
    return float(group.get("initial_accumulator_value", 0.0)) if name == "sum" else 0.0


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_with_any_optimizer_equals_a_dense_oracle_through_refreshes(make: Make) -> None:
    layer = _layer(bias=False, dtype=torch.float64)
    batches = _batches(12, torch.float64)
    expected = _dense_run(layer.weight, make, batches, {3, 6, 9})
    optimizer, parameter = make(layer.parameters()), layer.weight
    found = [parameter.detach().clone()]
    for t, batch in enumerate(batches):
        if t in {3, 6, 9}:
            layer.update_active_param_set()
        _step(layer, optimizer, batch)
        found.append(parameter.detach().clone())
        rest = ~layer.masks.backward
        assert rest.any()
        assert torch.equal(found[t + 1][rest], found[t][rest])
    assert layer.weight is parameter
    for t in range(len(batches)):
        torch.testing.assert_close(found[t + 1] - found[t], expected[t + 1] - expected[t])
        assert not torch.equal(found[t + 1], found[t])


def test_a_decay_that_would_move_all_of_theta_is_what_the_guard_undoes() -> None:
    theta = nn.Parameter(torch.ones(4))
    theta.grad = torch.zeros(4)
    for name in ("momentum", "adam", "adamw", "adamw_fused"):
        before = theta.detach().clone()
        OPTIMIZERS[name]([theta]).step()
        assert not (theta == before).any()


def _swap(layer: TopKastLinear) -> None:
    """Bring C into A and a part of A out of B."""
    layer.weight = torch.where(layer.masks.backward, layer.weight, 5.0)


def test_defect_02_slots_stay_with_their_weight_and_new_entries_start_at_zero() -> None:
    layer = _layer()
    optimizer = torch.optim.Adam(layer.parameters(), weight_decay=0.1)
    for batch in _batches(3):
        _step(layer, optimizer, batch)
    slots, old = optimizer.state[layer.weight], layer.masks.backward
    before = {name: slots[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    _swap(layer)
    layer.update_active_param_set()
    new = layer.masks.backward
    assert (new & ~old).sum() == 9
    for name, slot in before.items():
        assert torch.equal(slots[name], slot)
        assert slot[old].all()
        assert not slot[~old].any()
    _step(layer, optimizer, _batches(1)[0])
    assert not slots["exp_avg"][old & ~new].any()
    assert slots["exp_avg"][new].all()


def test_defect_01_an_optimizer_goes_on_training_after_a_refresh() -> None:
    layer = _layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.update_active_param_set()
    before = layer.weight.detach().clone()
    _step(layer, optimizer, _batches(1)[0])
    assert torch.equal(layer.weight != before, layer.masks.backward)


def test_an_optimizer_may_have_groups_other_parameters_and_an_unused_layer() -> None:
    layer, unused, dense = _layer(), _layer(), nn.Linear(5, 5)
    groups = [
        {"params": [layer.bias, *dense.parameters()], "weight_decay": 0.0},
        {"params": [layer.weight, *unused.parameters()], "weight_decay": 0.5},
    ]
    before = [p.detach().clone() for p in (layer.weight, unused.weight, dense.weight)]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for batch in _batches(2):
        _step(nn.Sequential(layer, dense), optimizer, batch)
    assert torch.equal(layer.weight != before[0], layer.masks.backward)
    assert torch.equal(unused.weight, before[1])
    assert (dense.weight != before[2]).all()


@pytest.mark.parametrize(
    "make", [*OPTIMIZERS.values(), *ROUNDING.values()], ids=[*OPTIMIZERS, *ROUNDING]
)
@pytest.mark.parametrize("steps", [3, 4])
def test_a_run_resumed_at_any_time_equals_the_uninterrupted_one(make: Make, steps: int) -> None:
    def train(layer: TopKastLinear, optimizer: Optimizer, first: int) -> None:
        for t, batch in enumerate(batches[first:], first):
            if t and t % 4 == 0:
                layer.update_active_param_set()
            before = layer.weight.detach().clone()
            _step(layer, optimizer, batch)
            assert not (layer.weight != before)[~layer.masks.backward].any()

    batches, layer = _batches(steps), _layer(bias=False)
    optimizer = make(layer.parameters())
    train(layer, optimizer, 0)
    file = io.BytesIO()
    torch.save((layer.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    other = _layer(bias=False)
    resumed = make(other.parameters())
    states = torch.load(file)
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    batches += _batches(6)
    train(layer, optimizer, steps)
    train(other, resumed, steps)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


class _Sharpness(Optimizer):
    """Takes the gradient at weights nearby, and puts those back that it had, as SAM does."""

    def __init__(self, params: Iterable[Tensor], make: Make) -> None:
        super().__init__(params, {})
        self.base = make(self.param_groups)  # type: ignore[arg-type]
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter in parameters:
            self.state[parameter]["old_p"] = parameter.data.clone()
            parameter.add_(parameter.grad, alpha=0.05)
        self.zero_grad()
        torch.enable_grad()(closure)()
        for parameter in parameters:
            parameter.data = self.state[parameter]["old_p"]
        self.base.step()


@pytest.mark.parametrize("make", [OPTIMIZERS["adamw"], OPTIMIZERS["momentum"]])
def test_weights_that_an_optimizer_puts_back_are_no_slot_of_it(make: Make) -> None:
    layer = _layer()
    twin = copy.deepcopy(layer)
    optimizer, plain = _Sharpness(layer.parameters(), make), make(twin.parameters())
    for t, batch in enumerate(_batches(6)):
        if t == 3:
            layer.update_active_param_set()
        before, outside = layer.weight.detach().clone(), ~layer.masks.backward

        def closure(batch: Batch = batch) -> None:
            mse_loss(layer(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]

        optimizer.zero_grad()
        closure()
        optimizer.step(closure)
        assert torch.equal(layer.weight[outside], before[outside])
        assert before[outside].all()
        _step(twin, plain, batch)
        assert not torch.equal(layer.weight, twin.weight)  # its gradient is that of elsewhere


class _Lookahead(Optimizer):
    """Keeps weights that follow those of another optimiser slowly, and are taken now and then."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base, self.param_groups, self.count = base, base.param_groups, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("slow", parameter.detach().clone())
        self.base.step()
        self.count += 1
        for parameter in self.param_groups[0]["params"] if self.count % 2 == 0 else ():
            slow = self.state[parameter]["slow"]
            parameter.copy_(slow.lerp_(parameter, 0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_slot_that_follows_the_weight_begins_as_the_weight(dtype: torch.dtype) -> None:
    layer = _layer(bias=False, dtype=dtype)
    optimizer = _Lookahead(torch.optim.SGD(layer.parameters(), lr=1.5))
    entered = 0
    for t, batch in enumerate(_batches(12, dtype)):
        known = layer.masks.backward
        if t in {3, 6, 9}:
            layer.update_active_param_set()
        inside, before = layer.masks.backward, layer.weight.detach().clone()
        _step(layer, optimizer, batch)
        slow = optimizer.state[layer.weight]["slow"]
        assert torch.equal(layer.weight[~inside], before[~inside])
        assert torch.equal(slow[~inside], before[~inside])
        came = inside & ~known
        entered += int(came.sum())
        gradient = layer.weight.grad
        assert gradient is not None
        close = ((layer.weight - before).abs() <= 1.5 * gradient.abs() + 1e-6)[came]
        assert dtype == torch.bfloat16 or close.all()
    assert entered > 2


class _Perturbed(Optimizer):
    """Moves all of θ, and then lets another optimiser make its step, as SAM does."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(1.0)
        self.inner.step()


def test_an_optimizer_within_another_has_a_copy_of_its_own() -> None:
    layer = _layer()
    optimizer = _Perturbed(torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1))
    for batch in _batches(3):
        before, outside = layer.weight.detach().clone(), ~layer.masks.backward
        mse_loss(layer(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert torch.equal(layer.weight[outside], before[outside])
        assert not torch.equal(layer.weight, before)


def test_a_parameter_of_another_kind_is_copied_anew() -> None:
    layer = _layer()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    for dtype in (torch.float32, torch.float64, torch.float32):
        layer.to(dtype)
        for inputs, targets in _batches(2, dtype):
            theta = layer.weight
            before, outside = theta.detach().clone(), ~layer.masks.backward
            optimizer.zero_grad()
            mse_loss(layer(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            assert torch.equal(theta[outside], before[outside])
            assert not torch.equal(theta, before)
            with torch.no_grad():
                theta.mul_(1.5)
        optimizer.state.clear()


def test_an_optimizer_made_before_takes_groups_later() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5))
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.1, weight_decay=0.5)
    masks = sparsify(model, TopKastConfig(0.6, 0.3)).masks()
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.2})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _step(model, optimizer, _batches(1)[0])
    for name, sets in masks.items():
        assert torch.equal(model.get_parameter(name) != before[name], sets.backward)


def test_a_weight_that_is_taken_away_is_named_and_others_train_on() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    handle = sparsify(model, TopKastConfig(0.6, 0.3))
    weight_norm(model[0])
    for use in (lambda: model(torch.ones(2, 6)), handle.step, lambda: densify(model)):
        with pytest.raises(
            RuntimeError, match=r"'0\.weight' is no parameter .* before tk\.sparsif"
        ):
            use()
    layer = _layer()
    before = layer.weight.detach().clone()
    _step(layer, torch.optim.SGD(layer.parameters(), lr=0.1), _batches(1)[0])
    assert torch.equal(layer.weight != before, layer.masks.backward)


class _Wide(Optimizer):
    """Momentum in float32, whatever the weight is."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for theta in self.param_groups[0]["params"]:
            slot = self.state[theta].setdefault("momentum", torch.zeros_like(theta).float())
            slot.mul_(0.9).add_(theta.grad.float() + 0.1 * theta.float())
            theta.sub_(0.1 * slot.to(theta.dtype))


def test_slots_of_another_precision_and_an_optimizer_of_ones_own() -> None:
    layer = _layer(dtype=torch.bfloat16)
    optimizer = _Wide(layer.parameters())
    for _ in range(2):
        before, backward = layer.weight.detach().clone(), layer.masks.backward
        layer(torch.randn(7, 6).bfloat16()).square().sum().backward()
        optimizer.step()
        assert torch.equal(layer.weight != before, backward)
        assert torch.equal(optimizer.state[layer.weight]["momentum"] != 0.0, backward)
        _swap(layer)
        layer.update_active_param_set()


def test_lbfgs_trains_through_refreshes_and_resumes() -> None:
    torch.manual_seed(4)
    layer, batch = _layer(), _batches(1)[0]
    make = partial(torch.optim.LBFGS, lr=0.5, max_iter=4)
    optimizer = make(layer.parameters())

    def step(layer: TopKastLinear, optimizer: Optimizer) -> float:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(layer(batch[0]), batch[1])
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        before, rest = layer.weight.detach().clone(), ~layer.masks.backward
        loss: Any = optimizer.step(closure)  # type: ignore[arg-type]
        assert torch.equal(layer.weight[rest], before[rest])
        return float(loss.detach())

    first = step(layer, optimizer)
    _swap(layer)
    layer.update_active_param_set()
    jumped = step(layer, optimizer)
    assert optimizer.state[layer.weight]["n_iter"] <= 4  # its history began anew
    other = _layer()
    resumed = make(other.parameters())
    other.load_state_dict(layer.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((layer, optimizer), (other, resumed)):
        losses = [step(one, its) for _ in range(4)]
        one.update_active_param_set()
        losses += [step(one, its) for _ in range(4)]
        assert losses[-1] < min(first, jumped)
    assert torch.equal(other.weight, layer.weight)


def test_a_compiled_step_of_the_optimizer_is_guarded_and_compiled_once() -> None:
    torch.compiler.reset()
    layer, counter = _layer(), CompileCounterWithBackend("aot_eager")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    step = torch.compile(optimizer.step, backend=counter)
    for batch in _batches(4):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        mse_loss(layer(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
        step()
        assert torch.equal(layer.weight != before, layer.masks.backward)
        layer.update_active_param_set()
    assert counter.frame_count == 1


FRESH = """
import sys, torch
layer = torch.load(sys.argv[1], weights_only=False)
optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
before = layer.weight.detach().clone()
layer(torch.randn(4, 6)).square().sum().backward()
optimizer.step()
assert torch.equal(layer.weight != before, layer.masks.backward)
"""


def test_a_layer_that_comes_out_of_a_file_is_guarded_in_a_fresh_process(tmp_path: Path) -> None:
    torch.save(_layer(), tmp_path / "layer.pt")
    subprocess.run([sys.executable, "-c", FRESH, tmp_path / "layer.pt"], check=True)


FORGOTTEN = r"nobody calls sparsifier\.step\(\): .* each optimizer\.step\(\)"


def forgetful(config: TopKastConfig, steps: int, count: bool = False) -> None:
    """Make steps of an optimiser, each of two batches, without `Sparsifier.step`."""
    model = nn.Linear(8, 8)
    sparsifier = sparsify(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(2):
            model(torch.ones(4, 8)).square().mean().backward()
        optimizer.step()
        if count:
            sparsifier.step()
            count = False


def test_a_step_that_is_forgotten_is_said_once() -> None:
    config = TopKastConfig(0.5, refresh_every=10)
    with pytest.warns(UserWarning, match=FORGOTTEN) as told:
        forgetful(config, 50)
    assert [Path(warning.filename).name for warning in told] == ["test_guard.py"]
    forgetful(config, 20)


@pytest.mark.parametrize(
    "options",
    [{"refresh_every": None}, {"method": static()}, {"explore_until": 0}, {"refresh_every": 40}],
    ids=str,
)
def test_where_no_refresh_is_overdue_nothing_is_said(options: Any) -> None:
    forgetful(TopKastConfig(0.5, **{"refresh_every": 10, **options}), 50)


def test_whoever_counts_now_and_then_hears_nothing() -> None:
    forgetful(TopKastConfig(0.5, refresh_every=10), 50, count=True)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_slots_outside_b_are_those_of_a_parameter_that_is_new(make: Make) -> None:
    layer, fresh = _layer(bias=False), nn.Parameter(torch.zeros(5, 6))
    optimizer, other = make(layer.parameters()), make([fresh])
    for batch in _batches(3):
        _step(layer, optimizer, batch)
    fresh.grad = torch.zeros(5, 6)
    other.step()
    outside = ~layer.masks.backward
    for name, slot in optimizer.state[layer.weight].items():
        if isinstance(slot, Tensor) and slot.shape == fresh.shape:
            begun = layer.weight.detach() if name == "ax" else other.state[fresh][name]
            torch.testing.assert_close(slot[outside], begun[outside])
