"""Modules made sparse in place: trajectories, schedules, every method, and what is refused."""

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import Optimizer

import topkast_func as tk
from tests.facade.networks import CONFIG, PAPER, Case, convolutional, each_case, perceptron
from topkast_func.masks import masks_at

METHODS = {
    "paper": PAPER,
    "default": tk.topkast(),
    "threshold": tk.topkast(entry="threshold", exchange=0.2),
    "bounded": tk.topkast("value", exchange=0.2),
    "random_backward": tk.random_backward("value", exchange=None),
    "ste": tk.ste(),
    "static": tk.static(),
    "set": tk.set(),
    "gmp": tk.gmp(1, 5, stages=2),
    "dense": tk.dense(),
}
CONFIGS = {
    **{name: replace(CONFIG, method=method) for name, method in METHODS.items()},
    "l1": replace(CONFIG, penalty="l1", penalty_weight=0.1),
    "group": replace(CONFIG, penalty="group_l2", penalty_weight=0.1),
    "blocks": replace(CONFIG, block_shape=(2, 1), sparse="*.weight", keep_dense="1.*"),
    "erk": replace(CONFIG, allocation="erk"),
    "patterns": replace(CONFIG, forward_sparsity={"0.*": 0.5, "4.*": 0.9}, backward_sparsity=0.25),
    "kept": replace(CONFIG, refresh_every=1, keep_dense="0.weight"),
    "scheduled": replace(CONFIG, refresh_every={0: 1, 3: 4}),
    "staged": replace(
        CONFIG,
        forward_sparsity=tk.staged({0: 0.25, 2: 0.5, 5: 0.75}),
        backward_sparsity=0.25,
        refresh_every=None,
    ),
    "explored": replace(CONFIG, refresh_every=2, explore_until=5),
    "settled": replace(CONFIG, refresh_every=2, explore_until=0),
}
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], tk.Optimizer]] = {
    "momentum": (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
        tk.sgd(0.1, momentum=0.9, weight_decay=0.01),
    ),
    "adamw": (
        partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
        tk.adamw(0.02, weight_decay=0.1),
    ),
}

Batch = tuple[Tensor, Tensor]


def _loss_fn(apply: Callable[..., Tensor], batch: Batch) -> Tensor:
    return mse_loss(apply(batch[0]), batch[1])


def _batches(count: int) -> list[Batch]:
    return [(torch.randn(6, 3, 5, 5).double(), torch.randn(6, 4).double()) for _ in range(count)]


def _step(model: nn.Module, handle: tk.Sparsifier, optimizer: Optimizer, batch: Batch) -> Tensor:
    optimizer.zero_grad()
    loss = _loss_fn(model, batch) + handle.penalty()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    handle.step()
    return loss.detach()


def _assert_same_masks(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert all(map(torch.equal, one[name], other[name])), name


# --- the trajectory ------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "ours"), OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_an_ordinary_loop_trains_as_train_step(
    config: tk.TopKastConfig, make: Callable[..., Optimizer], ours: tk.Optimizer
) -> None:
    model, batches = convolutional().double(), _batches(8)
    state = tk.init_state(model, config, ours, storage="dense")
    train_step = tk.make_train_step(copy.deepcopy(model), _loss_fn, config, ours, compile=False)
    handle = tk.sparsify(model, config)
    optimizer = make(model.parameters())
    entered = 0
    for batch in batches:
        sets, theta = handle.masks(), {n: p.detach().clone() for n, p in model.named_parameters()}
        loss, before = _step(model, handle, optimizer, batch), state
        state, metrics = train_step(state, batch)
        torch.testing.assert_close(loss, metrics.loss)
        expected = tk.dense_params(state)
        entering = config.method.enters_at != "value"
        for name, parameter in model.named_parameters():
            if name in sets and not entering:
                rest = ~sets[name].backward
                assert torch.equal(parameter[rest], theta[name][rest])
        if entering or config.method is METHODS["dense"]:
            continue
        for name, parameter in model.named_parameters():
            update = expected[name] - tk.dense_params(before)[name]
            torch.testing.assert_close(parameter - theta[name], update)
            assert update.any()
        entered += sum(
            int((m.backward & ~sets[n].backward).sum()) for n, m in handle.masks().items()
        )
    schedule, step = config.schedule, int(state.step)
    awaits = schedule.refreshes_at(step) and step not in schedule.starts
    due = tk.refresh(state, config) if awaits else state
    _assert_same_masks(handle.masks(), tk.masks_of(due))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), tk.dense_params(due)[name])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_method_that_reads_gradients_gets_those_of_the_step_before(compiled: bool) -> None:
    torch.compiler.reset()
    config = tk.TopKastConfig(0.75, refresh_every=2, method=tk.rigl())
    model = perceptron().double()
    handle = tk.sparsify(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for t in range(4):
        batch, masks = (torch.randn(8, 16).double(), torch.randn(8, 5).double()), handle.masks()
        point = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        with torch.no_grad():
            for name, sets in masks.items():
                point[name] *= sets.forward
        loss = _loss_fn(partial(torch.func.functional_call, perceptron(), point), batch)
        gradients = dict(zip(point, torch.autograd.grad(loss, list(point.values())), strict=True))
        optimizer.zero_grad()
        for half in (slice(0, 4), slice(4, 8)):  # accumulated
            loss = _loss_fn(run, (batch[0][half], batch[1][half])) / 2
            loss.backward()  # type: ignore[no-untyped-call]
        for name, sets in masks.items():
            torch.testing.assert_close(
                model.get_parameter(name).grad, torch.where(sets.backward, gradients[name], 0.0)
            )
        optimizer.step()
        theta = {n: p.detach().clone() for n, p in model.named_parameters() if n in masks}
        assert handle.step() == (t % 2 == 1)
        if t % 2 == 0:
            _assert_same_masks(handle.masks(), masks)
            continue
        allocations = dict.fromkeys(theta, tk.Allocation(0.75, 0.75))
        expected = masks_at(theta, allocations, config, step=t + 1, old=masks, gradients=gradients)
        _assert_same_masks(handle.masks(), expected)
        for name, sets in expected.items():
            came = sets.forward & ~masks[name].forward
            assert came.any()
            assert not model.get_parameter(name)[came].any()


def test_refreshes_by_hand_with_gradients_that_any_step_has() -> None:
    config = tk.TopKastConfig(0.75, refresh_every=None, method=tk.rigl())
    model = perceptron()
    handle = tk.sparsify(model, config)
    with pytest.raises(RuntimeError, match=r"chooses by the gradient at α of every entry, and"):
        handle.refresh()
    mse_loss(model(torch.randn(4, 16)), torch.randn(4, 5)).backward()  # type: ignore[no-untyped-call]
    before = handle.masks()
    handle.refresh()
    assert any(not torch.equal(m.forward, before[n].forward) for n, m in handle.masks().items())


def test_a_layer_that_a_batch_did_not_use_has_a_gradient_of_zero() -> None:
    model = nn.ModuleList([nn.Linear(16, 5), nn.Linear(16, 5)])
    handle = tk.sparsify(model, tk.TopKastConfig(0.75, refresh_every=1, method=tk.rigl()))
    optimizer, before = torch.optim.AdamW(model.parameters(), lr=0.1), handle.masks()
    unused = model[1].get_parameter("weight").detach().clone()
    loss = _loss_fn(model[0], (torch.randn(4, 16), torch.randn(4, 5)))
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert handle.step()
    assert not torch.equal(handle.masks()["0.weight"].forward, before["0.weight"].forward)
    kept = handle.masks()["1.weight"].forward & before["1.weight"].forward
    assert torch.equal(model[1].get_parameter("weight")[kept], unused[kept])


def test_weights_that_are_tied_have_one_pair_of_sets() -> None:
    model: Any = nn.ModuleDict({"embedding": nn.Embedding(12, 8), "head": nn.Linear(8, 12)})
    model["head"].weight = model["embedding"].weight
    handle = tk.sparsify(model, CONFIG)
    assert list(handle.masks()) == ["embedding.weight"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(
            model["head"](model["embedding"](torch.arange(12))), torch.arange(12)
        ).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        handle.step()
    own, its = (model[name].weight_sets for name in ("embedding", "head"))
    assert torch.equal(own, its)
    alpha = torch.where(handle.masks()["embedding.weight"].forward, model["head"].weight, 0.0)
    torch.testing.assert_close(model["embedding"](torch.arange(12)), alpha)
    torch.testing.assert_close(model["head"](torch.eye(8)), alpha.T + model["head"].bias)
    tk.densify(model)
    assert model["head"].weight is model["embedding"].weight
    torch.testing.assert_close(model["head"].weight.detach(), alpha.detach())


# --- the handle ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "random_backward", "set", "staged", "explored"])
@pytest.mark.parametrize("steps", [2, 3, 6])
def test_a_run_resumed_from_files_equals_the_uninterrupted_one(name: str, steps: int) -> None:
    def fresh() -> tuple[nn.Module, tk.Sparsifier, Optimizer]:
        model = convolutional().double()
        handle = tk.sparsify(model, CONFIGS[name], seed=3)
        return model, handle, torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)

    run, batches, file = fresh(), _batches(12), io.BytesIO()
    for batch in batches[:steps]:
        _step(*run, batch)
    torch.save([part.state_dict() for part in run], file)
    file.seek(0)
    other = fresh()
    states = torch.load(file)
    for i in range(3):
        other[i].load_state_dict(states[i])
    for batch in batches[steps:]:
        assert torch.equal(_step(*run, batch), _step(*other, batch))
    for key, tensor in run[0].state_dict().items():
        assert torch.equal(other[0].state_dict()[key], tensor), key


def test_a_dense_checkpoint_loaded_in_mid_run_has_the_sets_of_that_stage() -> None:
    model = convolutional().double()
    handle, config = tk.sparsify(model, CONFIGS["staged"]), CONFIGS["staged"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in _batches(5):
        _step(model, handle, optimizer, batch)
    dense = convolutional().double()
    model.load_state_dict(dense.state_dict())
    expected = tk.compute_masks(dict(dense.named_parameters()), config, step=5)
    _assert_same_masks(handle.masks(), expected)


def test_summary_has_a_row_for_each_parameter() -> None:
    model = perceptron()
    handle = tk.sparsify(model, tk.TopKastConfig(0.9, 0.8, keep_dense="2.*"))
    first, *others = handle.summary().rows
    assert (first.name, first.shape, first.forward, first.backward) == (
        "0.weight",
        (12, 16),
        19,
        38,
    )
    assert first.engine == "numba"
    assert first.bytes == 4 * 192 + 2 * 24
    assert [row.name for row in others] == ["0.bias", "2.weight", "2.bias"]
    assert {row.engine for row in others} == {"torch"}
    assert [row.reason for row in others] == ["one dimension", "keep_dense", "keep_dense"]
    assert handle.summary().notes[:1] == [
        "dense: 0.bias: one dimension; 2.weight, 2.bias: keep_dense"
    ]
    assert "0.weight" in repr(handle.summary())
    dense = tk.sparsify(nn.Sequential(nn.Conv3d(3, 6, 3)), CONFIG).summary().rows[0]
    assert (dense.engine, dense.reason) == (
        "dense",
        "all of α: of no layer that kernels know",
    )


def _swapped(model: Any) -> None:
    model[0], model[1] = model[1], model[0]


EDITS: dict[str, Callable[[Any], Any]] = {
    "swapped": _swapped,
    "inserted": lambda model: model.insert(0, nn.Linear(6, 6)),
    "deleted": lambda model: model.__delitem__(1),
}


@pytest.mark.filterwarnings("ignore:.* are sparse no more")
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_theta_and_sets_go_by_the_names_that_layers_have_now(edit: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    sparsifier = tk.sparsify(model, tk.TopKastConfig(0.5, penalty=None))
    edit(model)
    held, x = dict(model.named_parameters()), torch.randn(4, 6)
    theta = sparsifier.dense_params()
    assert theta.keys() == held.keys()
    assert all(torch.equal(theta[name], parameter) for name, parameter in held.items())
    before, sets = model(x), sparsifier.masks()
    plain = tk.densify(copy.deepcopy(model))
    torch.testing.assert_close(plain(x), before)
    for name, masks in sets.items():
        assert torch.equal(plain.get_parameter(name) != 0, masks.forward)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).square().mean().backward()
    optimizer.step()
    sparsifier.step()
    assert sparsifier.masks().keys() == sets.keys()


def test_penalty_is_that_of_the_configuration_and_trains() -> None:
    config = tk.TopKastConfig(0.75, 0.5, penalty="l1", penalty_weight=0.5)
    model = perceptron()
    handle, params = tk.sparsify(model, config), dict(model.named_parameters())
    expected = 0.5 * tk.exploration_penalty(params, handle.masks(), config)
    assert torch.equal(handle.penalty(), expected)
    handle.penalty().backward()  # type: ignore[no-untyped-call]
    for name, sets in handle.masks().items():
        gradient = params[name].grad
        assert gradient is not None
        assert torch.equal(gradient != 0, sets.backward)


def test_a_refresh_at_nan_warns_and_keeps_the_sets() -> None:
    model = perceptron()
    handle = tk.sparsify(model, tk.TopKastConfig(0.75, 0.5, refresh_every=1))
    before = handle.masks()
    mse_loss(model(torch.randn(4, 16)), torch.randn(4, 5)).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model.get_parameter("2.weight")[0, 0] = math.nan
    with pytest.warns(
        UserWarning, match=r"no refresh before step 1: params\['2\.weight'\] holds NaN"
    ):
        assert not handle.step()
    _assert_same_masks(handle.masks(), before)
    with pytest.raises(ValueError, match="holds NaN"):
        handle.refresh()


def test_frozen_weights_stay_and_do_not_stop_the_others() -> None:
    model = perceptron()
    model.get_parameter("0.weight").requires_grad_(False)
    handle = tk.sparsify(model, tk.TopKastConfig(0.75, 0.5, refresh_every=1))
    assert list(handle.masks()) == ["2.weight"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        _step(model, handle, optimizer, (torch.randn(4, 16), torch.randn(4, 5)))
    model.requires_grad_(False)
    handle.step()
    assert handle.steps == 3


def test_a_weight_that_is_frozen_in_mid_run_computes_the_same_through_refreshes() -> None:
    model = perceptron()
    handle = tk.sparsify(model, tk.TopKastConfig(0.75, 0.5, refresh_every=1, explore_until=9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def steps(count: int) -> tuple[bool, bool]:
        """Return whether θ, and whether A, of the first layer has changed."""
        theta, masks = model[0].weight.detach().clone(), handle.masks()["0.weight"]
        other = model[2].weight.detach().clone()
        for _ in range(count):
            _step(model, handle, optimizer, (torch.randn(4, 16), torch.randn(4, 5)))
        assert not torch.equal(model[2].weight, other)
        active = handle.masks()["0.weight"].forward
        return not torch.equal(model[0].weight, theta), not torch.equal(active, masks.forward)

    assert steps(3) == (True, True)
    model[0].weight.requires_grad_(False)
    assert steps(3) == (False, False)
    model[0].weight.requires_grad_(True)
    assert steps(2) == (True, True)
    model[0].weight.requires_grad_(False)
    assert steps(2) == (False, False)
    masks = handle.masks()["0.weight"]
    assert torch.equal(masks.forward, masks.backward)


@pytest.mark.parametrize("method", [tk.topkast(), PAPER, tk.set(), tk.rigl()], ids=str)
def test_a_layer_frozen_in_mid_run_keeps_weights_and_sets(method: tk.Method) -> None:
    model, batch = perceptron(), (torch.randn(4, 16), torch.randn(4, 5))
    handle = tk.sparsify(model, tk.TopKastConfig(0.75, 0.5, refresh_every=1, method=method))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for frozen in (False, True):
        model.get_submodule("0").requires_grad_(not frozen)
        before, sets = copy.deepcopy(model.state_dict()), handle.masks()
        for _ in range(3):
            _step(model, handle, optimizer, batch)
        same = [torch.equal(before[key], tensor) for key, tensor in model.state_dict().items()]
        assert same == [frozen and key.startswith("0.") for key in before]
        stayed = torch.equal(sets["0.weight"].forward, handle.masks()["0.weight"].forward)
        assert stayed == frozen


def test_training_starts_from_sets_of_ones_own() -> None:
    model = perceptron()
    masks = {
        n: tk.Masks(*(m.flip(0) for m in sets))
        for n, sets in tk.compute_masks(dict(model.named_parameters()), CONFIG).items()
    }
    handle = tk.sparsify(model, CONFIG, masks=masks)
    _assert_same_masks(handle.masks(), masks)
    masks["0.weight"] = tk.Masks(*(~mask for mask in masks["0.weight"]))
    other = perceptron()
    with pytest.raises(ValueError, match=r"masks\['0\.weight'\]"):
        tk.sparsify(other, CONFIG, masks=masks)
    assert type(other) is nn.Sequential


# --- densify -------------------------------------------------------------------------------


@each_case
def test_densify_leaves_a_plain_module_that_computes_the_same(case: Case) -> None:
    model = case.make()
    tk.sparsify(model, case.config)
    model.eval()
    inputs = case.inputs()
    expected, optimizer = model(inputs), torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    sparse = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert tk.densify(model) is model
    torch.testing.assert_close(model(inputs), expected)
    plain = case.make()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    plain.eval().load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(inputs), expected)
    pickle_size = len(_pickled(model))
    assert abs(pickle_size - len(_pickled(plain))) < 200
    (model(inputs) - 1).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name in sparse:
            assert (parameter != sparse[name]).any()
    tk.sparsify(model, case.config)


def _pickled(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def test_densify_makes_plain_layers_of_the_seeds() -> None:
    net: Any = nn.Sequential(
        tk.TopKastConv2d(3, 4, 3, 0.5, 0.25), nn.Flatten(), tk.TopKastLinear(36, 2, 0.9, 0.8)
    )
    inputs = torch.randn(2, 3, 5, 5)
    expected = net(inputs)
    tk.densify(net)
    assert [type(m) for m in net] == [nn.Conv2d, nn.Flatten, nn.Linear]
    assert {type(p) for p in net.parameters()} == {nn.Parameter}
    assert repr(net[2]) == repr(nn.Linear(36, 2))
    assert vars(net[2]).keys() == vars(nn.Linear(36, 2)).keys()
    torch.testing.assert_close(net(inputs), expected)
    assert (net[2].weight == 0).float().mean() == pytest.approx(0.9, abs=0.01)


# --- bad input -----------------------------------------------------------------------------


def _unchanged(model: nn.Module, before: nn.Module) -> bool:
    same = [type(a) is type(b) for a, b in zip(model.modules(), before.modules(), strict=True)]
    return all(same) and model.state_dict().keys() == before.state_dict().keys()


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (lambda: nn.ReLU(), CONFIG, "model has no parameter that requires a gradient"),
        (lambda: nn.LayerNorm(4), CONFIG, "selects no parameter; there are: 'weight', 'bias'"),
        (perceptron, tk.TopKastConfig(sparse="conv*"), r"'conv\*' matches no parameter"),
        (perceptron, tk.TopKastConfig(powerprop=2.0, method=tk.dense()), "has no sparse weights"),
        (lambda: perceptron().to("meta"), tk.TopKastConfig(powerprop=2.0), "initialise or load"),
        (perceptron, tk.TopKastConfig(block_shape=(5, 1), sparse="0.weight"), "does not divide"),
        (lambda: torch.compile(perceptron()), CONFIG, "'model' is wrapped, traced or compiled"),
        (lambda: nn.DataParallel(perceptron()), CONFIG, "'model' is wrapped"),
        (lambda: nn.Sequential(nn.DataParallel(perceptron())), CONFIG, "'0' is wrapped, .* before"),
        (
            lambda: nn.Sequential(nn.LazyLinear(3)),
            CONFIG,
            r"\['0\.weight', '0\.bias'\] have no shape yet",
        ),
    ],
)
def test_what_cannot_be_made_sparse_is_refused_and_stays(
    make: Callable[[], nn.Module], config: tk.TopKastConfig, message: str
) -> None:
    model = make()
    before = copy.copy(model)
    with pytest.raises(ValueError, match=message):
        tk.sparsify(model, config)
    assert type(model) is type(before)
    assert not any(key.endswith("_sets") for key, _ in model.named_buffers())


def test_a_nan_is_refused_and_the_module_stays() -> None:
    model = perceptron()
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.get_parameter("2.weight")[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"params\['2\.weight'\] holds NaN"):
        tk.sparsify(model, CONFIG)
    assert _unchanged(model, before)


@pytest.mark.parametrize(
    "make", [perceptron, lambda: nn.Sequential(tk.TopKastLinear(4, 4, 0.5, 0.2))]
)
def test_a_module_that_is_sparse_already_is_refused_and_stays(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    if make is perceptron:
        tk.sparsify(model, CONFIG)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"'.*' was made sparse already: densify it first"):
        tk.sparsify(model, tk.TopKastConfig(0.5, 0.25))
    assert _unchanged(model, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "model"}, TypeError, r"model must be a torch\.nn\.Module, got str"),
        ({"engine": "gpu"}, ValueError, "engine must be 'auto' or one of"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"model": perceptron().half(), "engine": "numba"}, TypeError, "not float16"),
    ],
)
def test_a_wrong_argument_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"model": perceptron(), "config": CONFIG, **arguments}
    with pytest.raises(error, match=message):
        tk.sparsify(**given)
    assert "weight_sets" not in dir(given["model"])
    assert type(given["model"]) in (nn.Sequential, str)


def test_gradients_of_ones_own_are_to_be_put_into_the_parameters() -> None:
    model = perceptron()
    handle = tk.sparsify(model, CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = _loss_fn(model, (torch.randn(4, 16), torch.randn(4, 5)))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad .* into parameter\.grad"):
        handle.step()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    handle.step()
    assert handle.steps == 1


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ((perceptron(),), TypeError, r"optimizer must be one .* Sequential: sparsifier\.penalty"),
        ((torch.ones(()),), TypeError, r"optimizer must be one of torch\.optim, .* got Tensor"),
        (("optimizer", True), TypeError, "scale must be a number"),
        (("optimizer", -1.0), ValueError, "scale must be in"),
        (("optimizer", math.nan), ValueError, "scale must be in"),
    ],
)
def test_what_the_penalty_is_added_to_is_an_optimizer(
    given: tuple[Any, ...], error: type[Exception], told: str
) -> None:
    model = perceptron()
    handle = tk.sparsify(model, CONFIG)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=told):
        handle.penalize(*(optimizer if part == "optimizer" else part for part in given))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert handle.penalize(optimizer)


def test_a_step_without_a_backward_pass_is_refused() -> None:
    model = perceptron()
    handle = tk.sparsify(model, CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(4, 16), torch.randn(4, 5)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no backward pass .* call loss\.backward\(\)"):
            handle.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match="no backward pass"):
        handle.step()
    _step(model, handle, optimizer, batch)
    with pytest.raises(RuntimeError, match="no backward pass"):
        handle.step()
    assert handle.steps == 1


def test_an_optimizer_over_other_parameters_is_refused() -> None:
    model, other = perceptron(), perceptron()
    handle = tk.sparsify(model, CONFIG)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(
        RuntimeError, match=r"moved none of the sparse weights: build it from model\.parameters"
    ):
        _step(model, handle, optimizer, (torch.randn(4, 16), torch.randn(4, 5)))
    assert handle.steps == 0


def test_gradients_that_are_gone_before_the_step_are_told_of() -> None:
    model = perceptron()
    handle = tk.sparsify(model, CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 16)).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) before loss\.backward\(\), not between"):
        handle.step()


def test_an_optimizer_over_other_parameters_is_told_of_later_too() -> None:
    model, other = perceptron(), perceptron()
    handle = tk.sparsify(model, CONFIG)
    own, wrong = (torch.optim.SGD(of.parameters(), lr=0.1) for of in (model, other))
    batch = torch.randn(4, 16), torch.randn(4, 5)
    _step(model, handle, own, batch)
    for _ in range(2):
        with pytest.warns(UserWarning, match="moved none of the sparse weights"):
            _step(model, handle, wrong, batch)
    _step(model, handle, own, batch)
    assert handle.steps == 4


def test_layers_that_are_sparse_no_more_are_told_of_once() -> None:
    model = perceptron()
    handle = tk.sparsify(model, CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(4, 16), torch.randn(4, 5)
    _step(model, handle, optimizer, batch)
    model[0] = nn.Linear(16, model[0].out_features)
    with pytest.warns(UserWarning, match=r"\['0\.weight'\] are sparse no more"):
        _step(model, handle, optimizer, batch)
    _step(model, handle, optimizer, batch)
    assert handle.steps == 3


def test_two_networks_with_two_optimizers_are_told_apart() -> None:
    models = [perceptron() for _ in range(2)]
    handles = [tk.sparsify(model, CONFIG) for model in models]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for _ in range(4):
        for run in zip(models, handles, optimizers, strict=True):
            _step(*run, (torch.randn(4, 16), torch.randn(4, 5)))
    assert [handle.steps for handle in handles] == [4, 4]


def test_a_first_step_that_a_scaler_leaves_out_is_none_of_another_optimizer() -> None:
    models = [perceptron() for _ in range(2)]
    handles = [tk.sparsify(model, CONFIG) for model in models]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    batch, scaler = (torch.randn(4, 16), torch.randn(4, 5)), torch.amp.GradScaler("cpu")
    for number, factor in ((0, 1.0), (1, math.inf)):
        loss = _loss_fn(models[number], batch) * factor
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizers[number])
        handles[number].step()
    assert [handle.steps for handle in handles] == [1, 1]


def copied(handle: tk.Sparsifier) -> tk.Sparsifier:
    return copy.deepcopy(handle)


def pickled(handle: tk.Sparsifier) -> tk.Sparsifier:
    return pickle.loads(pickle.dumps(handle))


def assigned(handle: tk.Sparsifier) -> tk.Sparsifier:
    handle.model.load_state_dict(copy.deepcopy(handle.model.state_dict()), assign=True)
    return handle


@pytest.mark.parametrize("moved", [copied, pickled, assigned])
@pytest.mark.parametrize("first", [math.inf, 1.0])
def test_a_first_step_that_a_scaler_leaves_out_is_one_of_a_copy_too(
    moved: Any, first: float
) -> None:
    runs = []
    for prepared in (moved, lambda handle: handle):
        torch.manual_seed(0)
        model = perceptron()
        handle = prepared(tk.sparsify(model, CONFIG))
        optimizer = torch.optim.AdamW(handle.model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu")
        for factor in (first, 1.0, 1.0, 1.0):
            before, masks = handle.model[0].weight.detach().clone(), handle.masks()["0.weight"]
            loss = _loss_fn(handle.model, (torch.randn(4, 16), torch.randn(4, 5))) * factor
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            handle.step()
            changed = handle.model[0].weight != before
            assert changed[masks.backward].any() == math.isfinite(factor)
            assert not changed[~masks.backward].any()
        runs.append(handle.model.state_dict())
        with pytest.raises(RuntimeError, match="no backward pass"):
            handle.step()
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_a_loop_of_ones_own_needs_no_optimizer() -> None:
    model = perceptron()
    handle = tk.sparsify(model, tk.TopKastConfig(0.75, 0.5, refresh_every=1))
    for _ in range(2):
        before, masks = model.get_parameter("0.weight").detach().clone(), handle.masks()
        model.zero_grad()
        mse_loss(model(torch.randn(4, 16)), torch.randn(4, 5)).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
        assert handle.step()
        moved = model.get_parameter("0.weight") != before
        assert not moved[~masks["0.weight"].backward].any()


def test_what_was_densified_or_never_sparse_says_so() -> None:
    model = perceptron()
    with pytest.raises(ValueError, match="model has no sparse weights: sparsify was never called"):
        tk.densify(model)
    handle = tk.sparsify(model, CONFIG)
    tk.densify(model)
    with pytest.raises(RuntimeError, match="no sparse weights any more: it was densified"):
        handle.step()
    with pytest.raises(ValueError, match=r"plain again, .* after training \(densify_at_end=False"):
        tk.densify(model)


def test_a_sweep_over_methods_may_have_the_dense_one_among_them() -> None:
    for method in (tk.dense(), tk.static()):
        model = perceptron()
        before = copy.deepcopy(model.state_dict())
        handle = tk.sparsify(model, replace(CONFIG, method=method))
        with pytest.raises(ValueError, match="was made sparse already"):
            tk.sparsify(model, CONFIG)
        trained = _step(
            model,
            handle,
            torch.optim.SGD(model.parameters(), 0.1),
            (torch.ones(2, 16), torch.ones(2, 5)),
        )
        assert trained.isfinite()
        plain = tk.densify(model)
        assert type(plain) is nn.Sequential
        assert plain.state_dict().keys() == before.keys()


LATER = {"steps": 7, "seed": 0}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({}, ValueError, r"the keys 'steps' and 'seed', got \[\]"),
        ({"steps": 3}, ValueError, r"the keys 'steps' and 'seed', got \['steps'\]"),
        ({"steps": -1, "seed": 0}, ValueError, "steps must be at least 0, got -1"),
        ({"steps": 1.5, "seed": 0}, TypeError, "steps must be an integer"),
    ],
)
def test_a_state_that_is_none_is_refused(
    state: dict[str, Any], error: type[Exception], message: str
) -> None:
    handle = tk.sparsify(perceptron(), CONFIG)
    with pytest.raises(error, match=message):
        handle.load_state_dict(state)
    assert handle.state_dict() == {"steps": 0, "seed": 0, "powerprop": 1.0}


@pytest.mark.parametrize("plain_first", [True, False])
@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (tk.TopKastConfig(0.75, 0.5, explore_until=5), (0.25, 0.25)),
        (tk.TopKastConfig(0.75, refresh_every=None, method=tk.gmp(0, 5)), (0.25, 0.25)),
        (tk.TopKastConfig(tk.staged({0: 0.5, 5: 0.75}), refresh_every=None), (0.25, 0.5)),
        (tk.TopKastConfig(tk.staged({0: 0.5, 5: 0.75}), method=tk.rigl()), (0.25, 0.25)),
    ],
)
def test_a_sparsifier_put_forward_reaches_its_stage_from_any_weights(
    config: tk.TopKastConfig, sizes: tuple[float, float], plain_first: bool
) -> None:
    model = perceptron()
    plain = copy.deepcopy(model.state_dict())
    handle = tk.sparsify(model, config)
    loads: list[Callable[[], Any]] = [
        lambda: model.load_state_dict(plain),
        lambda: handle.load_state_dict(LATER),
    ]
    for load in loads if plain_first else loads[::-1]:
        load()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _step(model, handle, optimizer, (torch.randn(4, 16), torch.randn(4, 5)))
    for masks in handle.masks().values():
        found = tuple(mask.double().mean().item() for mask in masks)
        assert found == pytest.approx(sizes, abs=0.02)
    assert handle.steps == LATER["steps"] + 1


def test_what_was_sparse_can_be_trained_by_a_step_and_keeps_no_sparsifier() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    config = tk.TopKastConfig(0.5, 0.25)
    kept = weakref.ref(tk.sparsify(model, config))
    model(torch.ones(2, 6)).sum().backward()
    tk.densify(model)
    gc.collect()
    assert kept() is None
    model.zero_grad()
    state = tk.init_state(model, config, tk.sgd(0.1))
    loss = lambda apply, x: apply(x).square().mean()  # noqa: E731
    step = tk.make_train_step(model, loss, config, tk.sgd(0.1), compile=False)
    assert step(state, torch.ones(3, 6))[1].loss > 0
    tk.sparsify(model, config)


def test_what_is_made_sparse_in_inference_mode_can_be_trained() -> None:
    model = perceptron()
    config = tk.TopKastConfig(0.75, refresh_every=1, method=tk.rigl())
    with torch.inference_mode():
        handle = tk.sparsify(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        _step(model, handle, optimizer, (torch.randn(4, 16), torch.randn(4, 5)))
    with torch.inference_mode():
        handle.load_state_dict(handle.state_dict())
        layer = tk.TopKastLinear(8, 8, 0.5, 0.25)
    _step(model, handle, optimizer, (torch.randn(4, 16), torch.randn(4, 5)))
    layer.update_active_param_set()
    assert not layer.weight_sets.is_inference()


def _passed_over(model: nn.Module, optimizer: torch.optim.Optimizer, how: str) -> None:
    """Make a backward pass whose gradient the next step is not to read."""
    model.requires_grad_(how != "frozen")
    inputs = torch.randn(8, 16, requires_grad=True)
    (1e3 * model(inputs)).sum().backward()
    model.requires_grad_()
    optimizer.zero_grad(set_to_none=how != "zero")


@pytest.mark.parametrize("how", ["none", "zero", "frozen", "copied"])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_that_a_loop_throws_away_choose_no_sets(how: str, compiled: bool) -> None:
    torch.compiler.reset()
    config = tk.TopKastConfig(0.75, refresh_every=1, method=tk.rigl())
    batch, found = (torch.randn(8, 16), torch.randn(8, 5)), []
    plain = perceptron()
    for others in (False, True):
        model = copy.deepcopy(plain)
        handle = tk.sparsify(model, config, engine="dense")
        if how == "copied":
            model, handle = copy.deepcopy((model, handle))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run: Any = torch.compile(model, backend="aot_eager") if compiled else model
        if others:
            _passed_over(run, optimizer, how)
        _loss_fn(run, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert handle.step()
        found.append(handle.masks())
    _assert_same_masks(*found)


def test_tied_weights_have_one_gradient_of_every_entry_once_they_are_moved() -> None:
    config = tk.TopKastConfig(0.75, refresh_every=1, method=tk.rigl())
    batch, plain, found = torch.randn(8, 16), [nn.Linear(16, 16) for _ in range(2)], []
    plain[1].weight = plain[0].weight
    for moved in (False, True):
        model = nn.Sequential(*copy.deepcopy(plain))
        handle = tk.sparsify(model, config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if moved:
            model.double().float()
        model(batch).square().sum().backward()
        optimizer.step()
        assert handle.step()
        found.append(handle.masks())
    _assert_same_masks(*found)


def test_a_parameter_is_without_hooks_of_its_gradient_once_it_is_dense() -> None:
    model = perceptron()
    tk.sparsify(model, tk.TopKastConfig(0.75, refresh_every=1, method=tk.rigl()))
    tk.densify(model)
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", tk.TopKastConfig(0.9, 0.8, powerprop=2.0)),
        ("model", nn.Linear(4, 4)),
        ("steps", -7),
        ("seed", 0.5),
    ],
)
def test_what_a_sparsifier_tells_is_not_set(name: str, value: Any) -> None:
    handle = tk.sparsify(perceptron(), tk.TopKastConfig(0.75))
    told = getattr(handle, name)
    with pytest.raises(AttributeError, match=rf"^sparsifier\.{name} is not to be set: "):
        setattr(handle, name, value)
    assert getattr(handle, name) is told


def test_a_model_goes_on_at_another_sparsity_as_the_message_says() -> None:
    model = perceptron()
    theta = tk.sparsify(model, tk.TopKastConfig(0.75, 0.5)).dense_params()
    tk.densify(model).load_state_dict(theta, strict=False)
    other = tk.sparsify(model, tk.TopKastConfig(0.9, 0.8))
    assert all(torch.equal(theta[name], p) for name, p in other.dense_params().items())


class Forwarding(nn.Module):
    """Hands what is written to it on to the module in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._modules["inner"] = inner

    def __setattr__(self, name: str, value: Any) -> None:
        if "inner" in self._modules:
            setattr(self._modules["inner"], name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule("inner")(x)
        return y


def test_a_module_that_hands_attributes_on_becomes_sparse_and_plain_itself() -> None:
    model = Forwarding(perceptron())
    kinds = [type(part) for part in model.modules()]
    handle = tk.sparsify(model, CONFIG)
    assert isinstance(model, Forwarding)
    assert handle.masks()
    with torch.no_grad():
        y = model(x := torch.randn(4, 16))
    tk.densify(model)
    assert [type(part) for part in model.modules()] == kinds
    assert torch.allclose(model(x), y)
