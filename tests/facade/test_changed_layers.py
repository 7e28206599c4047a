"""Layers that compute otherwise than torch's, or from later on, and other weights in them."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import topkast_func as tk
from topkast_func.facade.sparsifier import Sparsifier
from topkast_func.inference.replaceable import replaceable

CONFIG = tk.TopKastConfig(0.8, 0.5, penalty=None)


class Standardized(nn.Conv2d):
    """A convolution with a weight of mean zero."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Attends(nn.Module):
    """Calls an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return y


class Convolves(nn.Module):
    """Calls a convolution."""

    def __init__(self, kind: Callable[..., nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        self.layer = kind(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def doubled(layer: Any) -> None:
    """Let a convolution compute with twice its weight."""
    own = nn.Conv2d._conv_forward
    layer._conv_forward = lambda x, weight, bias: own(layer, x, 2 * weight, bias)


def circular(layer: Any) -> None:
    """Let a convolution pad by what is on the other side."""
    layer.padding_mode, layer._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


def attending_to_zero(layer: Any) -> None:
    """Let an attention attend to one more position, of zeros."""
    layer.add_zero_attn = True


IMAGES, ROWS = (3, 4, 6, 6), (3, 5, 8)
CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], None], tuple[int, ...]]] = {
    "class": (lambda: Convolves(Standardized), lambda _: None, IMAGES),
    "method": (Convolves, doubled, IMAGES),
    "mode": (Convolves, circular, IMAGES),
    "attention": (Attends, attending_to_zero, ROWS),
}
each_case = pytest.mark.parametrize(("make", "change", "shape"), CASES.values(), ids=CASES)


def loss(apply: Callable[..., Tensor], batch: Tensor) -> tuple[Tensor, Tensor]:
    y = apply(batch)
    return y.square().mean(), y


@each_case
@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
def test_a_step_computes_as_a_layer_does_that_is_changed_later(
    make: Callable[[], Any], change: Callable[[Any], None], shape: tuple[int, ...], compile: Any
) -> None:
    torch.manual_seed(0)
    model, x, optimizer = make(), torch.randn(shape), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    step = tk.make_train_step(model, loss, CONFIG, optimizer, compile=compile, engine="reference")
    before = step(state, x)[1].aux
    alpha = tk.forward_params(state)
    torch.testing.assert_close(before, functional_call(model, alpha, (x,)))
    change(model.layer)
    expected = functional_call(model, alpha, (x,))
    torch.testing.assert_close(step(state, x)[1].aux, expected)
    sets = tk.index_masks(model, tk.masks_of(state))
    torch.testing.assert_close(tk.sparse_forward(model, tk.dense_params(state), sets, x), expected)


@each_case
def test_a_sparse_layer_computes_as_it_is_changed_later(
    make: Callable[[], Any], change: Callable[[Any], None], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    plain = copy.deepcopy(model)
    masks = tk.sparsify(model, CONFIG, engine="reference").masks()
    alpha = {
        name: theta * masks[name].forward if name in masks else theta
        for name, theta in plain.named_parameters()
    }
    torch.testing.assert_close(model(x), functional_call(plain, alpha, (x,)))
    for layer in (model.layer, plain.layer):
        change(layer)
    torch.testing.assert_close(model(x), functional_call(plain, alpha, (x,)))


def test_a_layer_with_a_method_of_its_own_is_not_replaced() -> None:
    layer = nn.Conv2d(4, 4, 1)
    assert replaceable(layer, (nn.Conv2d,))
    doubled(layer)
    assert not replaceable(layer, (nn.Conv2d,))


def replaced(layer: Any) -> None:
    """Put another parameter in."""
    layer.weight = nn.Parameter(torch.randn(24, 8))


def written(layer: Any) -> None:
    """Put other data into the parameter."""
    layer._parameters["weight"].data = torch.randn(24, 8)


@pytest.mark.parametrize("change", [replaced, written])
@pytest.mark.parametrize("engine", ["reference", "dense"])
def test_a_weight_of_another_shape_is_refused(change: Callable[[Any], None], engine: Any) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 16))
    sparsifier = tk.sparsify(model, CONFIG, engine=engine)
    before, x = model[0].weight.detach().clone(), torch.randn(2, 8)
    y = model(x)
    change(model[0])
    for read in (lambda: model(x), sparsifier.masks, sparsifier.refresh):
        with pytest.raises(ValueError, match=r"'0\.weight' .* \(24, 8\), .* \(16, 8\)"):
            read()
    model[0].weight = nn.Parameter(before)
    torch.testing.assert_close(model(x), y)


class Tied(nn.Module):
    """An output layer that reads the weight of the embedding, in a checkpoint."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.reentrant = reentrant

    def head(self, hidden: Tensor) -> Tensor:
        return linear(hidden.tanh(), self.embedding.weight)

    def forward(self, tokens: Tensor) -> Any:
        hidden = self.embedding(tokens)
        if self.reentrant is None:
            return self.head(hidden)
        return checkpoint(self.head, hidden, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_computes_anew_with_alpha(reentrant: bool) -> None:
    gradients = []
    for how in (None, reentrant):
        torch.manual_seed(0)
        model: Any = Tied(how)
        tk.sparsify(model, CONFIG)
        model(torch.arange(16)).square().mean().backward()
        gradients.append(model.embedding.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_weight_is_theta_again_after_a_backward_pass() -> None:
    model = nn.Linear(8, 8)
    tk.sparsify(model, CONFIG)
    seen: list[bool] = []
    model.register_full_backward_hook(
        lambda *_: seen.append(bool((model.weight == 0).sum() == round(0.8 * 64)))
    )
    model(torch.ones(2, 8, requires_grad=True)).sum().backward()
    assert seen == [True]
    assert isinstance(model.weight, nn.Parameter)


class Named(nn.Linear):
    """A layer with an attribute of the name of the sets."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.weight_sets = 3


class Buffered(nn.Linear):
    """A layer with a buffer of that name."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("weight_sets", torch.arange(3.0))


class Tag(type):
    """A class of classes that are made with a tag alone."""

    def __new__(cls, name: str, bases: Any, members: Any, *, tag: int) -> Any:
        return super().__new__(cls, name, bases, members)

    def __init__(cls, name: str, bases: Any, members: Any, *, tag: int) -> None:
        super().__init__(name, bases, members)


class Tagged(nn.Linear, metaclass=Tag, tag=1):
    """A layer of such a class."""

    def __init__(self) -> None:
        super().__init__(8, 8)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (Named, ValueError, r"'1\.weight' .* has a 'weight_sets' already"),
        (Buffered, ValueError, r"'1\.weight' .* has a 'weight_sets' already"),
        (Tagged, TypeError, "tag"),
        (lambda: nn.Embedding(8, 8, max_norm=0.5), ValueError, r"'1\.weight' .* max_norm"),
    ],
)
def test_a_layer_that_cannot_be_sparse_leaves_the_others_plain(
    make: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), make())
    state, x = copy.deepcopy(model.state_dict()), torch.ones(2, 8)
    y, kinds = model[0](x), [type(part) for part in model.modules()]
    with pytest.raises(error, match=message):
        tk.sparsify(model, CONFIG)
    assert [type(part) for part in model.modules()] == kinds
    assert model.state_dict().keys() == state.keys()
    assert all(map(torch.equal, model.state_dict().values(), state.values()))
    assert torch.equal(model[0](x), y)
    tk.sparsify(model, replace(CONFIG, keep_dense="1.*"))


def test_an_error_after_the_last_layer_leaves_the_model_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    monkeypatch.setattr(Sparsifier, "_ask_for_gradients", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        tk.sparsify(model, CONFIG)
    assert [*model.state_dict()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert type(model[1]) is nn.Linear


def test_a_weight_is_sparse_in_one_model_at_a_time() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    tk.sparsify(first, CONFIG)
    with pytest.raises(ValueError, match=r"\['weight'\] are sparse weights of another model"):
        tk.sparsify(second, CONFIG)
    assert type(second) is nn.Linear
    tk.densify(first)
    tk.sparsify(second, CONFIG)


@pytest.mark.parametrize("seeds", [False, True])
def test_a_weight_that_is_given_up_stops_nothing_else(seeds: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if seeds:
        model = nn.Sequential(tk.TopKastLinear(8, 8, 0.8, 0.6), tk.TopKastLinear(8, 8, 0.8, 0.6))
    else:
        tk.sparsify(model, CONFIG)
    model[0].weight = None
    plain: Any = nn.Linear(8, 8)
    for trained in (plain, model[1]):
        before = trained.weight.detach().clone()
        trained(torch.ones(2, 8)).sum().backward()
        torch.optim.SGD(trained.parameters(), 0.1).step()
        assert not torch.equal(trained.weight, before)
    tk.sparsify(plain, CONFIG)
    assert isinstance(tk.densify(model)[1], nn.Linear)
    assert [type(part) for part in model] == [nn.Linear, nn.Linear]
    assert model[0].weight is None
    assert (model[1].weight == 0).sum() == round(0.8 * 64)


def parallel(model: nn.Module, devices: list[int]) -> Any:
    """Return what `torch.nn.DataParallel` is where there are such devices, all of them the CPU."""
    made: Any = nn.DataParallel.__new__(nn.DataParallel)
    nn.Module.__init__(made)
    made.module, made.device_ids, made.src_device_obj = model, devices, torch.device("cpu")
    made.scatter = lambda inputs, options, _: (inputs[0].chunk(2), ({}, {}))
    made.replicate = lambda part, _: [m._replicate_for_data_parallel() for m in part.modules()]
    return made


def test_copies_for_several_devices_are_refused_before_the_first() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    x = torch.ones(4, 8)
    tk.sparsify(model, CONFIG)
    assert torch.equal(parallel(model, [])(x), model(x))
    with pytest.raises(TypeError, match=r"DataParallel copies .* take DistributedDataParallel"):
        parallel(model, [0, 1])(x)
    assert type(parallel(tk.densify(model), [0, 1]).replicate(model, None)[0]) is nn.Sequential
