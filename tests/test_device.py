"""Weights on a device of their own: all of it there, and the host hardly ever waits.

Where it may, and why: `places.counted` reads the sizes of sets, of all tensors at once: of the
old A, from which a method takes away, and of the new sets, which are to be what was asked for.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import topkast_func as tk
from tests import on_device, pretend
from tests.kernels.drawn import problems
from tests.kernels.problems import Problem, integers, problem
from tests.on_device import METHODS, batch, config_of, mse, network, run, sparsified, step_of
from tests.pretend import DEVICE, WAITS, Pretended, on_cpu, pretending
from topkast_func.facade.sparse_weight import SparseWeight
from topkast_func.filling import drawn_among
from topkast_func.kernels import dense, pattern_of, sparse_linear
from topkast_func.kernels.pattern import flat, flattened
from topkast_func.places import counted, order_of, places_of, sent
from topkast_func.ranking import largest_among, top_sets
from topkast_func.testing import weights
from topkast_func.training import update
from topkast_func.types import changed

READ = pretend.Wait("places.counted", "_to_copy")
STEADY = [method for method in METHODS if not config_of(method).schedule.starts]
"""Their sparsities do not change."""


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretending() as there:
        yield there


def there(tree: Any) -> Any:
    """Move the tensors of a tuple to the device."""
    return tuple(tensor.to(DEVICE) for tensor in tree)


def same(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(on_cpu(one)), tree_leaves(on_cpu(other)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# Training.


@pytest.mark.parametrize("name", [name for name, _ in on_device.checks(DEVICE)])
def test_on_the_device(name: str, device: torch.device) -> None:
    dict(on_device.checks(device))[name]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "COMPILE", {"backend": "aot_eager"})
    on_device.check_steps(torch.device("cpu"), "compact", 1, dtype)


def test_numbers_reach_a_graph_on_its_device(device: torch.device) -> None:
    """A kernel reads no memory of the host; what is no CUDA tensor keeps CUDA graphs away."""
    met: list[tuple[Any, int]] = []

    def move(grads: Any, state: tk.OptimizerState, params: Any, lr: Tensor) -> Any:
        met.extend(((state.step, state.step.ndim), (lr, lr.ndim)))
        return plain.update(grads, state, params, lr)

    plain = tk.adam(lambda step: 0.1 / (1 + step))
    noted = tk.Optimizer(plain.init, move, plain.learning_rate, elementwise=True)
    state, _ = run(device, config_of(tk.topkast()), noted, steps=3)
    assert met
    assert all(isinstance(number, Pretended) and ndim == 0 for number, ndim in met)
    counts = (state.step, state.optimizer.step)
    assert [(count.device.type, int(count)) for count in counts] == [("cpu", 3), ("cpu", 3)]


def test_numbers_stay_on_the_host_for_values_on_several_devices(device: torch.device) -> None:
    state = tk.init_state(network(), config_of(tk.topkast()), tk.sgd(0.1))
    values = dict(state.weights.values)
    values["5.bias"] = values["5.bias"].to(device)
    rate = torch.tensor(0.1, dtype=torch.float64)
    for held, expected in ((values, rate), (state.weights.values, rate.reshape(1))):
        weights = changed(state.weights, values=held)
        place = update._place_of(state._replace(weights=weights))
        assert same((update._number(place, rate),), (expected,))


@pytest.mark.parametrize(
    ("method", "storage", "pattern"),
    [(method, *kind) for method in STEADY for kind in on_device.kinds(method)],
)
def test_the_host_waits_for_sizes_alone(
    method: tk.Method, storage: Any, pattern: str | None, device: torch.device
) -> None:
    config = replace(config_of(method, pattern=pattern), refresh_every=None, explore_until=None)
    model, optimizer = network().to(device), tk.adam(0.01)
    state = tk.init_state(model, config, optimizer, storage=storage)
    train_step = step_of(model, config, optimizer)
    state, _ = train_step(state, batch(device))
    WAITS.clear()
    state, _ = train_step(state, batch(device))
    assert not WAITS
    gradients = tk.dense_gradients(model, mse, state, batch(device))
    assert not WAITS
    state = tk.refresh(state, config, gradients)
    assert Counter(WAITS) == {READ: 1 + config.method.reads_sets}
    assert len(state.weights.sparse_names) >= len(WAITS)
    WAITS.clear()
    train_step(state._replace(step=state.step + 1), batch(device))
    asked = {READ: 1 + (pattern is not None)}  # the step asks for their sizes, and of groups
    assert Counter(WAITS) == asked


def test_theta_that_rests_on_the_host_is_waited_for_at_a_refresh_alone(
    device: torch.device,
) -> None:
    config, optimizer = config_of(tk.topkast()), tk.adam(0.01)
    state, _ = run(device, config, optimizer, steps=2, theta_device="cpu")
    WAITS.clear()
    model = network().to(device)
    train_step = step_of(model, config, optimizer)
    train_step(state._replace(step=torch.tensor(1)), batch(device))
    assert Counter(WAITS) == {READ: 1}  # the first step asks for the sizes of the sets
    refreshed = tk.refresh(state, config)
    assert {wait.where for wait in WAITS} == {
        "model/alpha.<genexpr>",  # the values go home
        "masks.masks_at",  # with the sets they are of,
        "entry.<genexpr>",
        "storage/compact.reindexed",  # and where they were;
        "storage/compact.<genexpr>",  # the new sets come back
        "places.counted",
    }
    assert all(theta.device.type == "cpu" for theta in refreshed.weights.theta.values())


@pytest.mark.parametrize("method", [tk.topkast(), tk.ste(), tk.set()], ids=str)
def test_nan_is_refused_on_the_device_too(method: tk.Method, device: torch.device) -> None:
    config = config_of(method)
    state, _ = run(device, config, tk.sgd(0.1), steps=1)
    values = dict(state.weights.values)
    values["3.weight"] = values["3.weight"] * torch.nan
    broken = state._replace(weights=changed(state.weights, values=values))
    with pytest.raises(ValueError, match=r"params\['3.weight'\] holds NaN"):
        tk.refresh(broken, config)


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_dense_products_are_made_on_the_device(
    block: tuple[int, int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Tensor] = []

    def noted(*given: Any) -> Tensor:
        places.append(flat(*given))
        return places[-1]

    monkeypatch.setattr(dense, "flat", noted)
    case = problem(block)
    masks, (x, g, values) = (
        there(tensors)
        for tensors in (
            (case.forward, case.backward),
            (integers(3, 60), integers(3, 40), case.values),
        )
    )
    forward, backward = masks
    pattern = pattern_of(forward, backward, block)
    WAITS.clear()
    y, vjp = torch.func.vjp(lambda v, x: sparse_linear(x, v, pattern, case.shape), values, x)[:2]
    for_values, for_x = vjp(g)
    assert not WAITS
    assert {(p.dtype, p.device.type) for p in places} == {(torch.int32, device.type)}
    assert [p.shape[0] for p in places] == [pattern.active_count, pattern.exploring_count]
    assert same((y, for_x), (on_cpu(x) @ case.alpha.T, on_cpu(g) @ case.alpha))
    assert same((for_values,), (case.gathered(on_cpu(g).T @ on_cpu(x)),))


@pytest.mark.parametrize(
    ("values", "product"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)]
)
def test_autocast_multiplies_in_its_dtype_on_a_device(
    values: torch.dtype,
    product: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So does torch: the gradients of the values and the bias are in their own dtype again."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    met = set()

    def product_of(x: Tensor, w: Tensor) -> Tensor:
        met.add(x.dtype)
        return x @ w.t()

    monkeypatch.setattr(dense, "_product", product_of)
    case = problem(dtype=values)
    forward, backward, theta, bias, x = there((
        case.forward,
        case.backward,
        case.values,
        torch.ones(40, dtype=values),
        integers(3, 60),
    ))
    pattern = pattern_of(forward, backward)

    def layer(theta: Tensor, bias: Tensor) -> Tensor:
        return sparse_linear(x, theta, pattern, case.shape, bias)

    y, vjp = torch.func.vjp(layer, theta, bias)[:2]
    gradients = vjp(torch.ones_like(y))
    assert y.dtype == product
    assert met == {product}
    assert [g.dtype for g in gradients] == [values, values]


def test_too_little_memory_at_a_refresh_leaves_the_state_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    config = config_of(tk.topkast())
    state, _ = run("cpu", config, tk.sgd(0.1), steps=1)
    before = tree_map(torch.clone, state)
    with monkeypatch.context() as patch:
        patch.setattr("topkast_func.training.refresh.chosen_anew", no_room)
        with pytest.raises(torch.OutOfMemoryError, match="theta_device='cpu'"):
            tk.refresh(state, config)
    assert same(state, before)
    tk.refresh(state, config)


def running_out(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, for which there is room in as many calls."""
    left = [*range(calls)]

    def run(*given: Any, **options: Any) -> Any:
        if not left:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        left.pop()
        return function(*given, **options)

    return run


@pytest.mark.parametrize("method", [tk.topkast(), tk.set(), tk.rigl()], ids=str)
@pytest.mark.parametrize(
    ("where", "calls"),
    [
        ("topkast_func.facade.sparsifier.chosen_anew", 0),
        ("topkast_func.facade.sparse_weight.SparseWeight.look", 1),
    ],
)
def test_too_little_memory_in_an_ordinary_loop_leaves_the_model_whole(
    where: str, calls: int, method: tk.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(method)
    models, sparsifiers, optimizers = [], [], []
    for _ in range(2):
        models.append(network())
        sparsifiers.append(tk.sparsify(models[-1], config, engine="reference"))
        optimizers.append(torch.optim.SGD(models[-1].parameters(), 0.1, momentum=0.9))
    x, y = batch("cpu")
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(step)
            nn.functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if step == 1:
            before = tree_map(torch.clone, models[0].state_dict())
            with monkeypatch.context() as patch:
                patch.setattr(where, running_out(calls, SparseWeight.look))
                with pytest.raises(torch.OutOfMemoryError, match=r"zero_grad.*call it again"):
                    sparsifiers[0].step()
            assert same(models[0].state_dict(), before)
            assert sparsifiers[0].steps == 1
        refreshed = [sparsifier.step() for sparsifier in sparsifiers]
        assert refreshed == [step == 1] * 2
        assert same(*(model.state_dict() for model in models))


class Generous(tk.Method):
    """Chooses one entry more than it is asked for."""

    def sets(self, situation: Any) -> Any:
        return top_sets(
            situation.name, situation.scores, situation.forward + 1, situation.backward + 1
        )


def test_a_method_that_chooses_too_many_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"must choose \(5, 5\) entries for A and B, and has chosen \(6, 6\)"
    ):
        tk.compute_masks({"weight": torch.randn(4, 5)}, tk.TopKastConfig(0.75, method=Generous()))


# Reading, files and the facade.


@pytest.mark.parametrize("method", on_device.CROSSED, ids=str)
def test_an_ordinary_loop_waits_for_the_sizes_of_new_sets_alone(
    method: tk.Method, device: torch.device
) -> None:
    sparsified(device, config_of(method), 3, WAITS.clear)
    assert not WAITS
    sparsifier = sparsified(device, config_of(method), 4, WAITS.clear)
    assert {wait.where for wait in WAITS} <= {"places.counted", "facade/derived.same"}
    assert len(WAITS) <= 2 + 2 * len(sparsifier.masks())


# What it is made of.


@settings(max_examples=20)
@given(weights(), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_rankings_equal_those_of_the_cpu(theta: Tensor, shares: tuple[float, float]) -> None:
    scores = theta.double()
    forward, backward = (1 + int(share * (theta.numel() - 1)) for share in sorted(shares))
    candidates = scores.round() == scores
    count = min(forward, int(candidates.sum()))
    expected = top_sets("w", scores, forward, backward)
    among = largest_among("w", candidates, scores, count)
    with pretending():
        ours, on_device = there((scores, candidates))
        assert same(top_sets("w", ours, forward, backward), expected)
        assert same(largest_among("w", on_device, ours, count), among)
        assert not WAITS


@settings(max_examples=20)
@given(problems(), st.integers(0, 3))
def test_patterns_equal_those_of_the_cpu(given: Problem, spare: int) -> None:
    sizes = (int(given.forward.sum()), int(given.backward.sum()))
    places = given.pattern.exploring.columns.shape[0] + spare
    expected = pattern_of(given.forward, given.backward, given.block, places)
    with pretending():
        forward, backward = there((given.forward, given.backward))
        found = pattern_of(forward, backward, given.block, places, sizes)
        assert not WAITS
        again = pattern_of(forward, backward, given.block, places)
        assert len(WAITS) == 1
    assert same(flattened(found), flattened(expected))
    assert same(flattened(again), flattened(expected))


def test_a_wide_pattern_equals_that_of_the_cpu() -> None:
    wide = problem(grid=(3, 2**16 + 8), densities=(0.1, 0.2))
    with pretending():
        found = pattern_of(*there((wide.forward, wide.backward)))
    assert same(flattened(found), flattened(wide.pattern))


@pytest.mark.parametrize("shape", [(1,), (7, 11), (3, 4, 5)])
def test_places_orders_and_counts(shape: tuple[int, ...]) -> None:
    masks = [torch.rand(shape) < share for share in (0.0, 0.4, 1.0)]
    numbers = torch.randint(0, 5, (40,), dtype=torch.int16)
    with pretending():
        assert counted([*there(masks[:2]), masks[2]]) == [int(mask.sum()) for mask in masks]
        assert len(WAITS) == 1
        for mask, ours in zip(masks, there(masks), strict=True):
            count = int(mask.sum()) + 2
            expected = [*mask.flatten().nonzero().flatten().tolist(), mask.numel(), mask.numel()]
            assert on_cpu(places_of(ours, count)).tolist() == expected
            assert places_of(mask, count).tolist() == expected
        assert same(order_of(there((numbers,))[0]), order_of(numbers))
    assert torch.equal(numbers[order_of(numbers)], numbers.sort(stable=True).values)


def test_what_is_sent_to_a_gpu_is_pinned() -> None:
    numbers = Mock()
    assert sent(numbers, torch.device("cuda")) is numbers.pin_memory().to.return_value
    numbers.pin_memory().to.assert_called_once_with(torch.device("cuda"), non_blocking=True)
    assert sent(numbers, torch.device("xpu")) is numbers.to.return_value


def test_draws_equal_those_of_the_cpu() -> None:
    mask = torch.rand(6, 9) < 0.5
    count = int(mask.sum())

    def draw(mask: Tensor) -> Tensor:
        return drawn_among(mask, count, 7, torch.Generator().manual_seed(3))

    with pretending():
        assert same(draw(*there((mask,))), draw(mask))
        assert not WAITS


# The device itself.


def test_tensors_of_two_devices_may_not_meet(device: torch.device) -> None:
    ours, theirs = torch.ones(3, device=device), torch.ones(3)
    for meet in (torch.add, torch.dot, lambda a, b: torch.cat((a, b)), lambda a, b: a[b.long()]):
        with pytest.raises(pretend.MixedError):
            meet(ours, theirs)
    assert on_cpu(ours + torch.tensor(2.0)).tolist() == [3, 3, 3]
    assert (ours * 2).device == device


def waiting(tensor: Tensor) -> list[Callable[[], Any]]:
    mask = tensor > 0
    return [
        tensor[0].item,
        tensor.tolist if type(tensor) is Tensor else tensor.cpu,
        mask.nonzero,
        lambda: tensor[mask],
        lambda: bool(mask.all()),
        lambda: torch.equal(tensor, tensor),
        lambda: torch.repeat_interleave(tensor.long()),
    ]


def test_every_wait_is_noted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretend, "ROOT", str(Path(__file__).parent))
    for wait in waiting(integers(4).abs().to(device)):
        WAITS.clear()
        wait()
        assert len(WAITS) == 1
