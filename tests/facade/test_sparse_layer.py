"""What people do with modules works with sparse ones, whatever kind of layer they are made of."""

import copy
import io
import itertools
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vmap,
)
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import topkast_func as tk
from tests.facade.networks import CASES, CONFIG, Case, each_case, perceptron
from tests.reference import count
from topkast_func.bits import unpacked


def _sparse(case: Case) -> tuple[Any, tk.Sparsifier]:
    model = case.make()
    return model, tk.sparsify(model, case.config)


def _loss(model: Callable[..., Tensor], inputs: Tensor) -> Tensor:
    return (model(inputs) - 1.0).square().mean()


def _gradients(model: Callable[..., Tensor], parameters: Any, inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(_loss(model, inputs), list(parameters)))


def _train(model: nn.Module, sparsifier: tk.Sparsifier, steps: int, inputs: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(model, inputs).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        sparsifier.step()


def _same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


# --- what it computes ----------------------------------------------------------------------


@each_case
def test_a_module_computes_what_its_plain_twin_does_at_alpha(case: Case) -> None:
    plain = case.make().eval()
    model = copy.deepcopy(plain)
    sparsifier, inputs = tk.sparsify(model, case.config), case.inputs()
    theta = dict(model.named_parameters())
    masks = sparsifier.masks()
    alpha = {
        name: torch.where(masks[name].forward, p.detach(), 0.0) if name in masks else p.detach()
        for name, p in theta.items()
    }
    point = {name: weight.clone().requires_grad_() for name, weight in alpha.items()}
    expected = functional_call(plain, point, (inputs,))
    torch.testing.assert_close(model(inputs), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), expected)  # where torch has fused layers
    dense = torch.autograd.grad((expected - 1.0).square().mean(), list(point.values()))
    for name, found, wanted in zip(
        theta, _gradients(model, theta.values(), inputs), dense, strict=True
    ):
        if name in masks:
            forward, backward = masks[name]
            assert wanted[backward & ~forward].any(), name
            wanted = torch.where(backward, wanted, 0.0)
        torch.testing.assert_close(found, wanted)


@each_case
def test_names_classes_and_parameters_stay(case: Case) -> None:
    model = case.make()
    parameters, classes = dict(model.named_parameters()), [type(m) for m in model.modules()]
    buffers, options = dict(model.named_buffers()), [repr(m) for m in model.modules()]
    sparsifier = tk.sparsify(model, case.config)
    assert all(map(isinstance, model.modules(), classes))
    assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in classes]
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for name, parameter in model.named_parameters():
        path, _, key = name.rpartition(".")
        assert parameter is parameters[name]
        assert getattr(model.get_submodule(path), key) is parameter
        assert type(parameter) is nn.Parameter
    sets = {f"{name}_sets" for name in sparsifier.masks()}
    assert dict(model.named_buffers()).keys() - buffers.keys() == sets
    assert len(sets) > 1
    tk.densify(model)
    assert [type(m) for m in model.modules()] == classes
    assert [repr(m) for m in model.modules()] == options
    assert dict(model.named_buffers()).keys() == buffers.keys()


def test_a_sparse_layer_tells_its_sparsity() -> None:
    model, _ = _sparse(CASES["perceptron"])
    assert repr(model[0]) == (
        "Linear(in_features=16, out_features=12, bias=True, weight_sparsity=(0.75, 0.5))"
    )


def test_the_weight_reads_as_theta_again_whatever_ends_the_forward_pass() -> None:
    class Stops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(4, 4), Stops())
    tk.sparsify(model, CONFIG)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 4))
    assert isinstance(model[0].weight, nn.Parameter)


def test_pruning_a_sparse_weight_is_refused_and_changes_nothing() -> None:
    model, _ = _sparse(CASES["perceptron"])
    before, inputs = copy.deepcopy(model), torch.randn(3, 16)
    with pytest.raises(AttributeError, match=r"'weight' is sparse, .* before tk\.sparsify"):
        prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[no-untyped-call]
    assert torch.equal(model[0].weight, before[0].weight)
    torch.testing.assert_close(model(inputs), before(inputs))


def test_threads_share_a_module() -> None:
    model, _ = _sparse(CASES["convolutional"])
    model.eval()
    inputs = [torch.randn(6, 3, 5, 5) for _ in range(8)]
    expected, wrong = [model(x) for x in inputs], []

    def run(number: int) -> None:
        for _ in range(20):
            same = torch.equal(model(inputs[number]), expected[number])
            theta = all(isinstance(m.weight, nn.Parameter) for m in model if hasattr(m, "weight"))
            wrong.extend([] if same and theta else [number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@each_case
def test_activation_checkpointing(case: Case) -> None:
    model, _ = _sparse(case)
    inputs = case.inputs()
    _loss(lambda x: checkpoint(model, x, use_reentrant=False), inputs).backward()  # type: ignore[no-untyped-call]
    found = [p.grad for p in model.parameters()]
    torch.testing.assert_close(found, _gradients(model, model.parameters(), inputs))


def test_an_embedding_with_sparse_gradients_trains() -> None:
    model = nn.Embedding(8, 4, sparse=True)
    sparsifier = tk.sparsify(model, CONFIG)
    before, backward = model.weight.detach().clone(), sparsifier.masks()["weight"].backward
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _loss(model, torch.arange(8)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert torch.equal(model.weight != before, backward)


# --- files and copies ----------------------------------------------------------------------


@each_case
def test_a_state_dict_resumes_and_has_the_plain_keys(case: Case) -> None:
    model, sparsifier = _sparse(case)
    inputs = case.inputs()
    plain = case.make().state_dict().keys()
    _train(model, sparsifier, 4, inputs)
    state = model.state_dict()
    assert [name for name in state if not name.endswith("_sets")] == list(plain)
    for name in sparsifier.masks():
        assert state[f"{name}_sets"].nbytes == 2 * math.ceil(state[name].numel() / 8)
    other, its = _sparse(case)
    assert not _same(model, other)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert other.load_state_dict(torch.load(file)) == ([], [])
    assert _same(model, other)
    torch.testing.assert_close(other.eval()(inputs), model.eval()(inputs), rtol=0, atol=0)
    names = its.masks().items()
    assert all(
        torch.equal(*pair) for n, m in names for pair in zip(m, sparsifier.masks()[n], strict=True)
    )


@each_case
def test_a_dense_checkpoint_loads_strictly_and_the_sets_are_chosen_from_it(case: Case) -> None:
    model, sparsifier = _sparse(case)
    dense = case.make()
    assert model.load_state_dict(dense.state_dict()) == ([], [])
    expected = tk.compute_masks(dict(dense.named_parameters()), case.config)
    for name, masks in sparsifier.masks().items():
        assert all(map(torch.equal, masks, expected[name])), name
    inputs, twin = case.inputs(), copy.deepcopy(dense)
    tk.sparsify(twin, case.config)
    torch.testing.assert_close(model.eval()(inputs), twin.eval()(inputs), rtol=0, atol=0)


@each_case
def test_a_plain_model_tells_a_checkpoint_with_sets_from_its_own(case: Case) -> None:
    model, sparsifier = _sparse(case)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        case.make().load_state_dict(model.state_dict())
    loaded = case.make().load_state_dict(model.state_dict(), strict=False)
    assert sorted(loaded.unexpected_keys) == sorted(f"{name}_sets" for name in sparsifier.masks())
    case.make().load_state_dict(tk.densify(model).state_dict())


def test_a_checkpoint_of_another_sparsity_is_refused_and_nothing_is_lost() -> None:
    model, _ = _sparse(CASES["perceptron"])
    other = perceptron()
    tk.sparsify(other, tk.TopKastConfig(0.9, 0.8))
    before, inputs = copy.deepcopy(model), torch.randn(3, 16)
    with pytest.raises(
        RuntimeError,
        match=r"0\.weight_sets has \|A\|, \|B\| = \(19, 38\), this layer \(48, 96\): the "
        r"checkpoint is of another sparsity",
    ):
        model.load_state_dict(other.state_dict())
    assert torch.equal(model[0].weight, before[0].weight)
    assert torch.equal(model[0].weight_sets, before[0].weight_sets)
    torch.testing.assert_close(model[:1](inputs), before[:1](inputs))


@pytest.mark.parametrize("blocks", [((8, 1), (1, 8)), ((1, 1), (4, 4)), ((2, 8), (4, 4))])
def test_sets_of_other_blocks_are_refused(blocks: tuple[tuple[int, int], ...]) -> None:
    torch.manual_seed(0)
    models = [nn.Linear(16, 16) for _ in blocks]
    for model, block in zip(models, blocks, strict=True):
        tk.sparsify(model, tk.TopKastConfig(0.75, 0.5, block_shape=block))
    others, own = (model.state_dict()["weight_sets"].clone() for model in models)
    with pytest.raises(
        RuntimeError, match=rf"other blocks than \({blocks[1][0]}, {blocks[1][1]}\)"
    ):
        models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(models[1].get_buffer("weight_sets"), own)
    models[1].get_buffer("weight_sets").copy_(others)
    with pytest.raises(RuntimeError, match="overwritten by what are no sets"):
        models[1](torch.ones(2, 16))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda sets: sets.flip(0), "A outside B"),
        (lambda sets: sets.float(), "must be torch.uint8, got torch.float32"),
        (lambda sets: sets[:, 1:], "size mismatch for 0.weight_sets"),
        (torch.zeros_like, r"\(0, 0\)"),
    ],
)
def test_damaged_sets_are_refused(damage: Callable[[Tensor], Tensor], message: str) -> None:
    model, _ = _sparse(CASES["perceptron"])
    state, before = model.state_dict(), model[0].weight_sets.clone()
    state["0.weight_sets"] = damage(state["0.weight_sets"])
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    assert torch.equal(model[0].weight_sets, before)


def test_nan_in_a_dense_checkpoint_is_named() -> None:
    model, _ = _sparse(CASES["perceptron"])
    state = perceptron().state_dict()
    state["2.weight"][0, 0] = math.nan
    with pytest.raises(RuntimeError, match=r"params\['2\.weight'\] holds NaN"):
        model.load_state_dict(state)


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": _saved,
}


@each_case
@pytest.mark.parametrize("clone", COPIES.values(), ids=COPIES.keys())
def test_a_copy_is_equal_and_its_own(clone: Callable[[Any], Any], case: Case) -> None:
    model, sparsifier = _sparse(case)
    inputs = case.inputs()
    _train(model, sparsifier, 2, inputs)
    other = clone(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert _same(model, other)
    before = copy.deepcopy(other.state_dict())
    _train(model, sparsifier, 2, inputs)
    assert all(torch.equal(other.state_dict()[name], before[name]) for name in before)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.5)
    _loss(other, inputs).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    rest = {name: ~masks.backward for name, masks in sparsifier.masks().items()}
    for name in rest:
        sets = before[f"{name}_sets"]
        moved = other.state_dict()[name] != before[name]
        outside = ~unpacked(sets[1], moved.shape)
        assert outside.any()
        assert not moved[outside].any()
        assert moved.any()


# --- devices and dtypes --------------------------------------------------------------------


@each_case
def test_half_and_back_leave_the_sets_alone(case: Case) -> None:
    model, sparsifier = _sparse(case)
    inputs, masks = case.inputs(), sparsifier.masks()
    for convert in (model.half, model.bfloat16, lambda: model.type(torch.bfloat16)):
        convert()
        like = next(model.parameters())
        cast = inputs.to(like.dtype) if inputs.is_floating_point() else inputs
        _loss(model, cast).backward()  # type: ignore[no-untyped-call]
        for name, own in sparsifier.masks().items():
            assert all(map(torch.equal, own, masks[name]))
            theta = model.get_parameter(name)
            assert theta.grad is not None
            assert theta.grad.dtype == theta.dtype
            assert not theta.grad[~own.backward].any()
            theta.grad = None
    model.float()
    assert model(inputs).dtype == torch.float32


def test_another_order_in_memory_changes_nothing() -> None:
    model, sparsifier = _sparse(CASES["convolutional"])
    inputs = torch.randn(6, 3, 5, 5)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    its = tk.Sparsifier(other, CONFIG)
    assert not other[0].weight.is_contiguous()
    _train(model, sparsifier, 4, inputs)
    _train(other, its, 4, inputs.to(memory_format=torch.channels_last))
    for name, masks in sparsifier.masks().items():
        assert all(map(torch.equal, masks, its.masks()[name]))
        torch.testing.assert_close(other.get_parameter(name), model.get_parameter(name))


@each_case
def test_deferred_initialisation(case: Case) -> None:
    trained, _ = _sparse(case)
    inputs = case.inputs()
    for state in (trained.state_dict(), case.make().state_dict()):
        model, sparsifier = _sparse(case)
        model.to("meta").to_empty(device="cpu").load_state_dict(state)
        twin = _sparse(case)[0]
        twin.load_state_dict(state)
        torch.testing.assert_close(model.eval()(inputs), twin.eval()(inputs), rtol=0, atol=0)
        _train(model, sparsifier, 4, inputs)


def test_a_module_without_data_is_assigned_a_plain_state_dict() -> None:
    plain, model = (nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)) for _ in range(2))
    handle = tk.sparsify(model.to("meta"), tk.TopKastConfig(0.5, 0.25))
    model.load_state_dict(plain.state_dict(), assign=True)
    expected = tk.compute_masks(dict(plain.named_parameters()), handle.config)
    for name, masks in handle.masks().items():
        assert all(map(torch.equal, masks, expected[name]))
    assert model(torch.ones(2, 8)).isfinite().all()


def test_a_module_without_data_is_sparsified_and_assigned() -> None:
    trained, _ = _sparse(CASES["perceptron"])
    model = perceptron().to("meta")
    sparsifier = tk.sparsify(model, CONFIG)
    assert model(torch.randn(2, 16, device="meta")).shape == (2, 5)
    model.load_state_dict(trained.state_dict(), assign=True)
    inputs = torch.randn(6, 16)
    torch.testing.assert_close(model(inputs), trained(inputs), rtol=0, atol=0)
    _train(model, sparsifier, 4, inputs)


def test_layers_that_are_initialised_last_have_their_sets_chosen_then() -> None:
    with torch.device("meta"):
        model: Any = nn.Sequential(tk.TopKastLinear(16, 12, 0.75, 0.5), nn.Linear(12, 5))
    layer = model.to_empty(device="cpu")[0]
    layer.reset_parameters()
    assert torch.equal(
        torch.stack(layer.idx_fwd), torch.stack(layer.compute_mask(layer.weight, 0.75))
    )
    sparse = perceptron()
    sparsifier = tk.sparsify(sparse, CONFIG)
    for part in sparse.to("meta").to_empty(device="cpu"):
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    sparse(torch.ones(2, 16))
    expected = tk.compute_masks(dict(sparse.named_parameters()), CONFIG)
    for name, masks in sparsifier.masks().items():
        assert all(map(torch.equal, masks, expected[name]))


def test_sets_that_a_method_draws_are_drawn_once_there_is_data() -> None:
    model = perceptron()
    handle = tk.sparsify(model, tk.TopKastConfig(0.75, method=tk.set()), seed=3)
    drawn = handle.masks()
    model.to("meta").to_empty(device="cpu")
    for part in (model[0], model[2]):
        part.reset_parameters()
    model(torch.ones(2, 16))
    for name, masks in handle.masks().items():
        assert all(map(torch.equal, masks, drawn[name]))


@pytest.mark.parametrize("engine", ["dense", "reference", "numba"])
def test_what_is_looked_at_in_inference_mode_is_trained_with(engine: Any) -> None:
    model, other = perceptron(), perceptron()
    tk.sparsify(model, CONFIG, engine=engine)
    tk.sparsify(other, CONFIG, engine=engine)
    inputs = torch.randn(6, 16)
    for own, its in zip(model.buffers(), other.buffers(), strict=True):
        own.data.copy_(its)
    with torch.inference_mode():
        model(inputs)
    found = _gradients(model, model.parameters(), inputs)
    torch.testing.assert_close(found, _gradients(model, model.parameters(), inputs))
    assert all(gradient.any() for gradient in found)


@pytest.mark.parametrize("then", ["load_state_dict", "reset_parameters", "forward"])
def test_a_layer_of_the_seed_is_moved_to_meta_and_back(then: str) -> None:
    trained = tk.TopKastLinear(16, 12, 0.75, 0.5)
    layer: Any = tk.TopKastLinear(16, 12, 0.75, 0.5).to("meta").to_empty(device="cpu")
    inputs = torch.randn(6, 16)
    if then == "load_state_dict":
        layer.load_state_dict(trained.state_dict())
        assert torch.equal(layer(inputs), trained(inputs))
    elif then == "reset_parameters":
        layer.reset_parameters()
    else:
        with torch.no_grad():
            layer.weight.copy_(trained.weight)
    layer(inputs).sum().backward()
    assert int(layer.weight.grad.count_nonzero()) == 96


def test_a_weight_that_was_read_is_differentiated_by_torch_func_again_and_again() -> None:
    layer = tk.TopKastLinear(16, 12, 0.75, 0.5)
    inputs = torch.randn(6, 16)
    layer.weight.detach().sum()
    params = {name: p.detach() for name, p in layer.named_parameters()}
    loss = lambda p: _loss(lambda x: functional_call(layer, p, (x,)), inputs)  # noqa: E731
    expected = _gradients(layer, layer.parameters(), inputs)
    for _ in range(2):
        torch.testing.assert_close(list(grad(loss)(params).values()), expected)
        assert isinstance(layer.weight, nn.Parameter)


@each_case
def test_what_overwrites_the_sets_is_named_and_zeros_have_them_chosen(case: Case) -> None:
    model, sparsifier = _sparse(case)
    inputs = case.inputs()
    for name in sparsifier.masks():
        sets = model.get_buffer(f"{name}_sets")
        sets.copy_(torch.randint(256, sets.shape, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match=r"_sets' of '.*' has been overwritten .*use_buffers"):
        model(inputs)
    with pytest.raises(RuntimeError, match="has been overwritten"):
        model.state_dict()
    for name in tk.compute_masks(dict(model.named_parameters()), case.config):
        model.get_buffer(f"{name}_sets").zero_()
    model(inputs)
    for masks in sparsifier.masks().values():
        assert masks.forward.sum() == count(0.75, masks.forward.numel())


def test_kernels_compute_with_the_same_bits_in_another_buffer() -> None:
    layer = tk.TopKastLinear(16, 12, 0.75, 0.5, engine="numba")
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with pytest.raises(TypeError, match=r"inputs are torch\.float64, the weight is torch\.float32"):
        functional_call(layer, buffers, (torch.ones(2, 16).double(),))


# --- averages ------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("decay", [None, 0.5])
def test_an_averaged_model_holds_the_average_of_theta(buffers: bool, decay: float | None) -> None:
    model, sparsifier = _sparse(CASES["perceptron"])
    inputs = torch.randn(6, 16)
    multi = None if decay is None else get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    averaged = AveragedModel(model, use_buffers=buffers, multi_avg_fn=multi)
    mean, changed = None, False
    sets = model[0].weight_sets.clone()
    for t in range(6):
        _train(model, sparsifier, 1, inputs)
        averaged.update_parameters(model)
        theta = model[0].weight.detach().clone()
        weight = decay or 1 / (t + 1)
        mean = theta if mean is None else mean + weight * (theta - mean)
        changed = changed or not torch.equal(sets, model[0].weight_sets)
    assert changed
    theta = dict(averaged.module.named_parameters())
    torch.testing.assert_close(theta["0.weight"].detach(), mean)
    if buffers:  # a mean of bits is none
        for use in (averaged, lambda x: averaged.state_dict()):
            with pytest.raises(RuntimeError, match=r"'weight_sets' of '0\.weight'.* use_buffers"):
                use(inputs)
        for name in sparsifier.masks():
            averaged.module.get_buffer(f"{name}_sets").copy_(model.get_buffer(f"{name}_sets"))
    masks = sparsifier.masks()
    expected = tk.sparse_forward(perceptron(), theta, masks, inputs)
    torch.testing.assert_close(averaged(inputs), expected)
    twin = copy.deepcopy(averaged)
    twin.load_state_dict(averaged.state_dict())
    torch.testing.assert_close(twin(inputs), expected)


def test_statistics_of_an_averaged_model_are_those_of_its_forward_pass() -> None:
    model, sparsifier = _sparse(CASES["convolutional"])
    inputs = torch.randn(6, 3, 5, 5)
    averaged: Any = AveragedModel(model)
    for _ in range(3):
        _train(model, sparsifier, 1, inputs)
        averaged.update_parameters(model)
    update_bn([inputs], averaged)
    alpha = tk.densify(copy.deepcopy(averaged.module))
    torch.testing.assert_close(averaged.module[1].running_mean, alpha[0](inputs).mean((0, 2, 3)))


def test_a_copy_of_the_bits_through_data_is_followed() -> None:
    model, _ = _sparse(CASES["perceptron"])
    other, _ = _sparse(CASES["perceptron"])
    inputs = torch.randn(6, 16)
    model(inputs)
    for own, its in zip(
        (*model.parameters(), *model.buffers()),
        (*other.parameters(), *other.buffers()),
        strict=True,
    ):
        own.data.copy_(its.data)
    torch.testing.assert_close(model(inputs), other(inputs), rtol=0, atol=0)


# --- precision -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@each_case
def test_autocast(case: Case) -> None:
    model, sparsifier = _sparse(case)
    inputs = case.inputs()
    expected = model.eval()(inputs)
    onednn = torch.backends.mkldnn.flags(enabled=False)  # which not every processor has an LSTM in
    with onednn, torch.autocast("cpu", torch.bfloat16):
        output = model(inputs)
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)  # 8 bits of mantissa
    output.float().square().sum().backward()
    for name, masks in sparsifier.masks().items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.dtype == torch.float32
        assert not gradient[~masks.backward].any()
        assert gradient[masks.backward].any()


def test_scaled_and_clipped_gradients_and_a_step_that_is_left_out() -> None:
    model, sparsifier = _sparse(CASES["perceptron"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    moved = []
    for t in range(4):
        before, masks = model[0].weight.detach().clone(), sparsifier.masks()["0.weight"]
        loss = _loss(model, torch.randn(6, 16)) * (math.inf if t in (0, 2) else 1.0)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        if t % 2:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert norm > 0.1
            torch.testing.assert_close(nn.utils.get_total_norm(grads), torch.tensor(0.1))
        optimizer.zero_grad()
        sparsifier.step()
        moved.append(bool((model[0].weight != before)[masks.backward].any()))
        assert torch.equal(model[0].weight[~masks.backward], before[~masks.backward])
    assert moved == [False, True, False, True]


# --- transformations -----------------------------------------------------------------------


@each_case
def test_functional_gradients_are_those_of_autograd(case: Case) -> None:
    model, _ = _sparse(case)
    model.eval()
    inputs = case.inputs()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return _loss(lambda x: functional_call(model, params, (x,)), inputs)

    expected = _gradients(model, model.parameters(), inputs)
    torch.testing.assert_close(list(grad(loss)(params).values()), expected)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    output = functional_call(model, model.state_dict(), (inputs,))
    torch.testing.assert_close(output, model(inputs))


def _tangent(loss: Any, params: Any) -> Any:
    return jvp(loss, (params,), (tree_map(torch.cos, params),))[1]


DERIVATIVES: dict[str, Callable[..., Any]] = {
    "jvp": _tangent,
    "jacfwd": lambda loss, params: jacfwd(loss)(params),
    "hessian": lambda loss, params: hessian(loss)(params),
    "jacrev twice": lambda loss, params: jacrev(jacrev(loss))(params),
    "along a direction": lambda loss, params: _tangent(grad(loss), params),
    "grad twice": lambda loss, params: grad(
        lambda p: torch.stack([g.square().sum() for g in grad(loss)(p).values()]).sum()
    )(params),
}


@pytest.mark.parametrize(
    ("name", "engine", "compiled"),
    [
        *itertools.product(DERIVATIVES, ("dense", "reference"), (False,)),
        *((name, "reference", True) for name in ("jvp", "jacfwd", "along a direction")),
    ],
)
def test_forward_mode_and_second_derivatives_go_through_alpha(
    name: str, engine: Any, compiled: bool
) -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    plain, inputs = copy.deepcopy(model), torch.randn(2, 5).double()
    sparsifier = tk.sparsify(model, CONFIG, engine=engine)
    params = {name: p.detach() for name, p in model.named_parameters()}
    masks = sparsifier.masks()

    def loss(params: dict[str, Tensor]) -> Tensor:
        return _loss(lambda x: functional_call(model, params, (x,)), inputs)

    def dense(params: dict[str, Tensor]) -> Tensor:
        return _loss(lambda x: tk.sparse_forward(plain, params, masks, x), inputs)

    way = DERIVATIVES[name]
    run: Any = lambda params: way(loss, params)  # noqa: E731
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, expected = run(params), way(dense, params)
    torch.testing.assert_close(found, expected)
    if name == "jacfwd":
        forward, backward = masks["0.weight"]
        assert found["0.weight"][backward & ~forward].any()


@pytest.mark.parametrize("engine", ["dense", "reference", "numba"])
def test_a_gradient_of_a_gradient_by_autograd_goes_through_alpha(engine: Any) -> None:
    model, inputs = perceptron().double(), torch.randn(3, 16).double().requires_grad_()
    plain = copy.deepcopy(model)
    masks = tk.sparsify(model, CONFIG, engine=engine).masks()
    theta = {name: p.detach().requires_grad_() for name, p in plain.named_parameters()}
    seconds = []
    for run, weight in (
        (model, model[0].weight),
        (lambda x: tk.sparse_forward(plain, theta, masks, x), theta["0.weight"]),
    ):
        (first,) = torch.autograd.grad(_loss(run, inputs), inputs, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), weight)[0])
    torch.testing.assert_close(*seconds)
    assert seconds[0].any()


def test_gradients_per_example_are_those_of_each_alone() -> None:
    model, sparsifier = _sparse(CASES["perceptron"])
    params = {name: p.detach() for name, p in model.named_parameters()}
    inputs = torch.randn(3, 4, 16)

    def loss(params: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return _loss(lambda x: functional_call(model, params, (x,)), inputs)

    found = vmap(grad(loss), (None, 0))(params, inputs)
    alone = [grad(loss)(params, x) for x in inputs]
    for name, stacked in found.items():
        torch.testing.assert_close(stacked, torch.stack([each[name] for each in alone]))
    forward, backward = sparsifier.masks()["0.weight"]
    assert found["0.weight"][:, backward & ~forward].any()


@pytest.mark.parametrize("compiled", [False, True])
def test_an_ensemble_computes_what_its_members_do(compiled: bool) -> None:
    torch.compiler.reset()
    models = [_sparse(CASES["perceptron"])[0] for _ in range(3)]
    base = copy.deepcopy(models[0]).to("meta")
    inputs = torch.randn(6, 16)

    def call(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        output: Tensor = functional_call(base, (params, buffers), (inputs,))
        return output

    run: Any = vmap(call)
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = run(*stack_module_state(models))
    torch.testing.assert_close(found, torch.stack([model(inputs) for model in models]))


COMPILED = [
    *((name, "aot_eager") for name in CASES if name != "recurrent"),  # torch compiles no LSTM
    ("perceptron", "inductor"),
]


@pytest.mark.parametrize(("name", "backend"), COMPILED)
def test_a_compiled_module_equals_the_eager_one_through_refreshes_in_one_graph(
    name: str, backend: str
) -> None:
    torch.compiler.reset()
    case = CASES[name]
    model, sparsifier = _sparse(case)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    refreshed = []
    for _ in range(7):
        inputs = case.inputs()
        found = _gradients(compiled, model.parameters(), inputs)
        expected = _gradients(model, model.parameters(), inputs)
        torch.testing.assert_close(found, expected)
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            parameter.grad = gradient
        for name, (forward, backward) in sparsifier.masks().items():
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            assert gradient[backward & ~forward].any()
        _loss(compiled, inputs).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        refreshed.append(sparsifier.step())
    assert refreshed.count(True) == 2
    assert counter.frame_count == 1


def _copied_from(other: nn.Module, model: nn.Module) -> None:
    """Write to a module what another holds, as a broadcast or an average does."""
    with torch.no_grad():
        for own, its in zip(
            itertools.chain(model.parameters(), model.buffers()),
            itertools.chain(other.parameters(), other.buffers()),
            strict=True,
        ):
            own.copy_(its)


@pytest.mark.parametrize(
    ("engine", "backend"),
    [("reference", "aot_eager"), ("reference", "inductor"), ("dense", "aot_eager")],
)
def test_a_compiled_module_never_computes_with_the_sets_of_other_bits(
    engine: Any, backend: str
) -> None:
    torch.compiler.reset()
    (model, sparsifier), (other, _) = (
        (made := perceptron(), tk.sparsify(made, CONFIG, engine=engine)) for _ in range(2)
    )
    inputs, counter = torch.randn(6, 16), CompileCounterWithBackend(backend)
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    _copied_from(other, model)  # before it is traced
    expected = _gradients(other, other.parameters(), inputs)
    forward, backward = sparsifier.masks()["0.weight"]
    assert expected[0][backward & ~forward].any()
    torch.testing.assert_close(_gradients(compiled, model.parameters(), inputs), expected)
    third = perceptron()
    tk.sparsify(third, CONFIG, engine=engine)
    _copied_from(third, model)
    expected = _gradients(third, third.parameters(), inputs)
    if engine != "dense":
        told = r"<name>_sets, of shape \(2, 24\), has been written to .* run the module itself once"
        with pytest.raises(RuntimeError, match=told):
            compiled(inputs)
        model(inputs)
    torch.testing.assert_close(_gradients(compiled, model.parameters(), inputs), expected)
    assert counter.frame_count == 1
    model[0].weight_sets.random_(0, 256)
    with pytest.raises(RuntimeError, match="has been written to since"):
        compiled(inputs)


def test_a_compiled_penalty_is_not_that_of_other_bits() -> None:
    torch.compiler.reset()
    model, other = perceptron(), perceptron()
    sparsifier, its = (tk.sparsify(m, CONFIG, engine="reference") for m in (model, other))
    penalty = torch.compile(sparsifier.penalty, backend="aot_eager")
    torch.testing.assert_close(penalty(), sparsifier.penalty())
    _copied_from(other, model)
    with pytest.raises(RuntimeError, match="has been written to since"):
        penalty()
    model(torch.ones(1, 16))
    torch.testing.assert_close(penalty(), its.penalty())


def test_blocks_that_are_compiled_one_by_one_share_a_graph() -> None:
    torch.compiler.reset()
    blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
    tk.sparsify(blocks, CONFIG, engine="reference")
    counter = CompileCounterWithBackend("aot_eager")
    for block in blocks:
        x = torch.randn(2, 16)
        found = torch.compile(block, fullgraph=True, backend=counter)(x)
        torch.testing.assert_close(found, block(x))
    assert counter.frame_count == 1


def test_a_compiled_functional_gradient_equals_the_eager_one() -> None:
    torch.compiler.reset()
    model, sparsifier = _sparse(CASES["convolutional"])
    model.eval()
    params = {name: p.detach() for name, p in model.named_parameters()}
    inputs = torch.randn(6, 3, 5, 5)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return _loss(lambda x: functional_call(model, params, (x,)), inputs)

    eager = grad(loss)(params)
    compiled = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")(params)
    for name, (forward, backward) in sparsifier.masks().items():
        assert eager[name][backward & ~forward].any()
        assert not eager[name][~backward].any()
    torch.testing.assert_close(compiled, eager)


def test_sets_that_are_not_chosen_yet_are_named_where_a_module_is_compiled() -> None:
    torch.compiler.reset()
    model, _ = _sparse(CASES["perceptron"])
    model.to("meta").to_empty(device="cpu")
    with pytest.raises(Exception, match=r"the sets of '0\.weight' are not chosen yet"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(torch.ones(2, 16))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", [name for name in CASES if name != "recurrent"])
def test_an_exported_program_computes_the_same_without_this_library(name: str) -> None:
    case = CASES[name]
    model, _ = _sparse(case)
    model.eval()
    inputs = case.inputs()
    program = torch.export.export(model, (inputs,))
    assert "topkast" not in str(program.graph)
    torch.testing.assert_close(program.module()(inputs), model(inputs))
