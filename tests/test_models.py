"""Models as they come: convolutions, recurrence, attention, tied weights, other packages'."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import topkast_func as tk
from topkast_func.testing import check_counts, check_nested, check_outside_untouched


def every_matrix(name: str, tensor: Tensor) -> bool:
    """Those of recurrent layers, ``weight_ih_l0``, among them."""
    return "weight" in name and tensor.ndim >= 2


CONFIG = tk.TopKastConfig(0.7, 0.4, sparse=every_matrix, refresh_every=3)
AOT, BROKEN = {"backend": "aot_eager"}, {"fullgraph": False}


class Tagger(nn.Module):
    """Embedding, LSTM and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> dict[str, Tensor]:
        hidden, _ = self.lstm(self.embedding(words))
        return {"logits": self.head(hidden)}


class InByOut(nn.Module):
    """A layer whose weight is [in, out], with a dropout and a norm that has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 30) / 5)
        self.norm = nn.BatchNorm1d(30)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.drop(self.norm(x @ self.weight))
        return hidden, hidden.mean()


def images() -> nn.Module:
    convolution = nn.Conv2d(4, 8, 3, groups=2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


def signals() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Conv1d(4, 6, 1), nn.ReLU(), nn.Flatten())


def classifier() -> nn.Module:
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config)


def language_model() -> nn.Module:
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config)


def words(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape)


def squared(apply: Callable[..., Tensor], x: Tensor) -> Tensor:
    return apply(x).square().mean()


def next_word(apply: Callable[..., Any], x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(apply(x)["logits"][:, :-1].flatten(0, 1), x[:, 1:].flatten())


def of_a_tuple(apply: Callable[..., Any], x: Tensor) -> Tensor:
    hidden, mean = apply(x)
    return (hidden - 1).square().mean() + mean.square()


def its_own_loss(apply: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> Tensor:
    loss: Tensor = apply(input_ids=batch[0], labels=batch[1]).loss
    return loss


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[], Any], Any]] = {
    "grouped 2d": (images, squared, lambda: torch.randn(5, 4, 4, 4), True),
    "depthwise 1d": (signals, squared, lambda: torch.randn(5, 4, 6), AOT),
    "lstm, tied": (Tagger, next_word, lambda: words(4, 6), BROKEN),
    "[in, out]": (InByOut, of_a_tuple, lambda: torch.randn(9, 20), AOT),
    "bert": (classifier, its_own_loss, lambda: (words(4, 8), torch.randint(0, 2, (4,))), AOT),
    "gpt2": (language_model, next_word, lambda: words(4, 8), AOT),
}
"""How each is made, its loss, its batches, and how it compiles."""

CLOSE: Any = {"rtol": 2e-3, "atol": 2e-4}
every_model = pytest.mark.parametrize("name", MODELS)


def path(name: str, steps: int, compile: Any, storage: Any = "compact") -> list[tk.TrainState]:
    torch.manual_seed(0)
    make, loss_fn, batch, _ = MODELS[name]
    model, optimizer = make().train(), tk.adam(0.01)
    states = [tk.init_state(model, CONFIG, optimizer, storage=storage)]
    train_step = tk.make_train_step(model, loss_fn, CONFIG, optimizer, compile=compile)
    for given in [batch() for _ in range(steps)]:
        states.append(train_step(states[-1], given)[0])
    return states


@every_model
def test_the_rules_hold(name: str) -> None:
    states = path(name, 5, compile=False)
    for before, after in pairwise(states[:4]):
        check_outside_untouched(before, after)
    params, masks = tk.dense_params(states[-1]), tk.masks_of(states[-1])
    check_nested(masks, params)
    check_counts(masks, params, CONFIG)
    for weight, sets in masks.items():
        moved = params[weight] != tk.dense_params(states[0])[weight]
        assert moved[sets.backward].any(), weight


@every_model
def test_compiled_equals_eager(name: str) -> None:
    eager, compiled = (path(name, 4, compile)[-1] for compile in (False, MODELS[name][3]))
    torch.testing.assert_close(tk.dense_params(compiled), tk.dense_params(eager), **CLOSE)


@every_model
def test_storages_agree(name: str) -> None:
    compact, dense = (path(name, 4, False, storage)[-1] for storage in ("compact", "dense"))
    torch.testing.assert_close(tk.dense_params(compact), tk.dense_params(dense), **CLOSE)


@every_model
def test_the_trained_weights_run_in_the_plain_module(name: str) -> None:
    make, loss_fn, batch, _ = MODELS[name]
    state, model = path(name, 4, compile=False)[-1], make()
    alpha = tk.forward_params(state)
    model.load_state_dict(alpha, strict=False)
    model.eval()
    given = batch()
    loaded = loss_fn(model, given)
    bound = loss_fn(lambda *a, **k: functional_call(model, alpha, a, k), given)
    torch.testing.assert_close(loaded, bound)


class Swapping(nn.Module):
    """Runs a layer with its weight, with another in its place, and with one it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("average", torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        tripled = functional_call(self.layer, {"weight": 3 * self.layer.weight}, (x,))
        kept = functional_call(self.layer, {"weight": self.get_buffer("average")}, (x,))
        return self.layer(x) + tripled * kept


class Walking(nn.Module):
    """Looks at its own parts when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        for child in self.layers.children():
            x = child(x) if not list(child.children()) else -x
        for buffer in self.buffers():
            x = x * buffer
        return x * len(list(self.modules()))


@pytest.mark.parametrize("compile", [False, AOT])
@pytest.mark.parametrize("make", [Swapping, Walking])
def test_kernels_stand_in_for_the_weight_they_hold_and_for_nothing_else(
    make: type[nn.Module], compile: Any
) -> None:
    torch.manual_seed(0)
    model = make().double()
    teacher = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = tk.compute_masks(teacher, CONFIG)

    def distil(apply: Any, x: Tensor) -> Tensor:
        by_others = functional_call(model, teacher, (x,)) + model(x).detach()
        if not compile:
            by_others = by_others + deepcopy(model)(x).detach()
        sparse = tk.sparse_forward(model, teacher, masks, x)
        return (apply(x) - by_others - sparse).square().mean()

    losses = []
    storages: tuple[Any, ...] = ("compact", "dense")
    for storage in storages:
        state = tk.init_state(model, CONFIG, tk.sgd(0.01), storage=storage)
        step = tk.make_train_step(model, distil, CONFIG, tk.sgd(0.01), compile=compile)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
            state, metrics = step(state, x)
            losses.append(metrics.loss)
    assert len({float(loss) for loss in losses}) > 3
    torch.testing.assert_close(losses[:4], losses[4:])


class Clamping(nn.Module):
    """Changes its weight when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.clamp_(-0.1, 0.1)
        return self.layer(x)


class ClampingData(Clamping):
    """Does so without a trace in the version of the tensor."""

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.clamp_(-0.1, 0.1)
        return self.layer(x)


class ClampingAnew(Clamping):
    """Puts another parameter in the place of its own."""

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight = nn.Parameter(self.layer.weight.clamp(-0.1, 0.1))
        return self.layer(x)


@pytest.mark.parametrize("make", [Clamping, ClampingData, ClampingAnew])
@pytest.mark.parametrize("compile", [False, True])
def test_a_forward_pass_that_changes_a_parameter_is_refused_and_nothing_is_lost(
    compile: bool, make: type[nn.Module]
) -> None:
    model, optimizer = make(), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    before = {n: t.clone() for n, t in tk.dense_params(state).items()}
    step = tk.make_train_step(model, squared, CONFIG, optimizer, compile=compile)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"changes parameters \['layer.weight'\]"):
            step(state, torch.randn(3, 6))
    torch.testing.assert_close(tk.dense_params(state), before, rtol=0, atol=0)


class ClampingInTraining(Clamping):
    """Changes its bias, and in training mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.layer.bias.clamp_(-0.1, 0.1)
        return self.layer(x)


def test_a_change_of_mode_is_a_new_reason_to_see_whether_the_model_is_pure() -> None:
    model, optimizer, x = ClampingInTraining().eval(), tk.sgd(0.1), torch.randn(3, 6)
    state = tk.init_state(model, CONFIG, optimizer)
    before = {n: t.clone() for n, t in tk.dense_params(state).items()}
    step = tk.make_train_step(model, squared, CONFIG, optimizer, compile=False)
    step(state, x)
    model.train()
    with pytest.raises(ValueError, match=r"changes parameters \['layer.bias'\]"):
        step(state, x)
    torch.testing.assert_close(tk.dense_params(state), before, rtol=0, atol=0)


def test_a_forward_pass_that_changes_its_inputs_is_refused_and_they_stay() -> None:
    model, optimizer = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)), tk.sgd(0.1)
    step = tk.make_train_step(model, squared, CONFIG, optimizer, compile=False)
    inputs = -torch.ones(3, 6)
    with pytest.raises(ValueError, match="changes its inputs in place"):
        step(tk.init_state(model, CONFIG, optimizer), inputs)
    assert torch.equal(inputs, -torch.ones(3, 6))


def test_a_weight_computed_from_others_is_not_computed_to_look_at_it() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    optimizer = tk.sgd(0.1)
    tk.init_state(nn.Sequential(layer, nn.Linear(6, 6)), CONFIG, optimizer)
    tk.make_train_step(layer, squared, CONFIG, optimizer)
    torch.testing.assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)


def test_a_model_with_nothing_to_train_is_named() -> None:
    frozen = nn.Linear(6, 6).requires_grad_(requires_grad=False)
    for method in (tk.dense(), tk.topkast()):
        with pytest.raises(ValueError, match="no parameter that requires a gradient"):
            tk.init_state(frozen, replace(CONFIG, method=method), tk.sgd(0.1))


class Recurrent(nn.Module):
    """Keeps what it saw last, from its first run on."""

    last: Tensor | None

    def __init__(self, start: Tensor | None) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("last", start)

    def forward(self, x: Tensor) -> Tensor:
        last = x[:0] if self.last is None else self.last
        self.last = torch.cat([last, x.detach()])
        return self.layer(x) + self.last.mean()


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (None, r"sets buffers \['last'\] that were None: register them as tensors"),
        (torch.zeros(1, 6), r"gives buffers \['last'\] another shape"),
    ],
)
def test_a_forward_pass_that_makes_a_buffer_is_refused_and_nothing_is_written(
    start: Tensor | None, message: str
) -> None:
    model, optimizer = Recurrent(start), tk.sgd(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    step = tk.make_train_step(model, squared, CONFIG, optimizer, compile=False)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            step(state, torch.randn(3, 6))
    assert model.last is start


class Buffered(nn.Module):
    """A layer whose weight is a buffer too, of the module around it or of one behind it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer, self.behind, self.name = nn.Linear(6, 6), nn.Module(), name
        path, _, key = name.rpartition(".")
        self.get_submodule(path).register_buffer(key, self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.get_buffer(self.name)


def by_hand(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Compute what that does from its parameters alone."""
    weight = params["layer.weight"]
    return nn.functional.linear(x, weight, params["layer.bias"]) + x @ weight


@pytest.mark.parametrize("compile", [False, AOT])
@pytest.mark.parametrize("name", ["kept", "behind.kept"])
def test_a_parameter_that_is_a_buffer_too_is_a_parameter(
    name: str, compile: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, optimizer, x = Buffered(name), tk.sgd(0.1), torch.randn(5, 6)
    params = {own: p.detach().clone() for own, p in model.named_parameters()}
    states = []
    for form, given in ((model, model), (by_hand, params)):
        state = tk.init_state(given, CONFIG, optimizer)
        step = tk.make_train_step(form, squared, CONFIG, optimizer, compile=compile)
        for _ in range(4):
            state, _ = step(state, x)
        states.append(state)
    state = states[0]
    theta, alpha, masks = tk.dense_params(state), tk.forward_params(state), tk.masks_of(state)
    torch.testing.assert_close(theta, tk.dense_params(states[1]))
    assert alpha.keys() == params.keys()
    tk.save(state, tmp_path / "state")
    loaded = tk.load(tmp_path / "state", CONFIG, model, optimizer)
    torch.testing.assert_close(tk.dense_params(loaded), theta, rtol=0, atol=0)
    runs = [tk.sparse_forward(model, theta, masks, x), functional_call(model, alpha, (x,))]
    runs.append(tk.sparse_module(state, model)(x))
    model.load_state_dict(alpha, strict=False)
    for found in (*runs, model(x)):
        torch.testing.assert_close(found, by_hand(alpha, x))


@pytest.mark.parametrize("field", ["sparse", "keep_dense"])
def test_a_pattern_that_matches_a_tied_weight_by_its_second_name_alone_is_named(field: str) -> None:
    config = tk.TopKastConfig(**{field: ["head*"]})  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"'head.weight' is tied to 'embedding.weight', which .*'head\*'"
    ):
        tk.init_state(Tagger(), config, tk.sgd(0.1))


@pytest.mark.parametrize("field", ["forward_sparsity", "allocation"])
def test_tied_weights_given_two_sparsities_are_named(field: str) -> None:
    numbers = {"embedding.weight": 0.9, "head.weight": 0.5}
    config = tk.TopKastConfig(**{field: numbers})  # type: ignore[arg-type]
    with pytest.raises(
        ValueError,
        match=r"'head.weight' is tied to 'embedding.weight': .*0\.5\] and \[0\.9",
    ):
        tk.init_state(Tagger(), config, tk.sgd(0.1))
    same = tk.TopKastConfig(forward_sparsity={"embedding*": 0.9})
    assert "embedding.weight" in tk.masks_of(tk.init_state(Tagger(), same, tk.sgd(0.1)))
