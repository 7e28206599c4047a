"""What is sparse in training is sparse in inference: attention, Conv1D, tied embeddings."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import topkast_func as tk
from tests.inferred import layers, made, small
from topkast_func.inference.attention import SparseAttention
from topkast_func.inference.embedding import SparseEmbedding
from topkast_func.inference.stored import Stored
from topkast_func.kernels.inference import dense_matrix

WIDTH = 32


class Attention(nn.Module):
    """Attention that is told how to attend."""

    def __init__(self, options: dict[str, Any], **of_layer: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, **of_layer)
        self.options = options

    def forward(self, *inputs: Tensor) -> Any:
        return self.attention(*inputs, **self.options)


class Language(nn.Module):
    """Embeddings tied to the output layer, and a layer of GPT-2 between them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, WIDTH)
        self.middle = Conv1D(WIDTH, WIDTH)  # type: ignore[no-untyped-call]
        self.head = nn.Linear(WIDTH, 40, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.middle(self.words(words))))
        return out


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def sequences(*lengths: int) -> list[Tensor]:
    return [torch.randn(3, length, WIDTH) for length in lengths]


PADDING = torch.arange(7) >= torch.tensor([[7], [5], [4]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)
PER_HEAD = torch.where(torch.arange(12 * 49).view(12, 7, 7) % 5 == 1, -torch.inf, 0.5)


@small
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"key_padding_mask": PADDING},
        {"key_padding_mask": PADDING, "need_weights": False},
        {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
        {"attn_mask": CAUSAL < 0, "is_causal": True, "key_padding_mask": PADDING},
        {"attn_mask": CAUSAL, "is_causal": True},
        {"attn_mask": PER_HEAD, "need_weights": False},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_attention_computes_what_torch_does(options: dict[str, Any], batch_first: bool) -> None:
    sparse, plain, _ = made(Attention(options, batch_first=batch_first))
    assert len(layers(sparse)) == 4
    (x,) = sequences(7)
    x = x if batch_first else x.transpose(0, 1)
    with torch.no_grad():
        (y, weights), (expected, expected_weights) = sparse(x, x, x), plain(x, x, x)
    assert_close(y, expected)
    assert_close(weights, expected_weights)


@small
@pytest.mark.parametrize("bias", [True, False])
def test_attention_between_sequences_and_without_a_batch(bias: bool) -> None:
    sparse, plain, _ = made(Attention({}, bias=bias, batch_first=True))
    query, key = sequences(5, 7)
    with torch.no_grad():
        for inputs in ((query, key, key + 1), (query[0], key[0], key[1]), (key[0],) * 3):
            assert_close(sparse(*inputs), plain(*inputs))


@small
def test_attention_wants_the_mask_that_it_is_told_of() -> None:
    sparse, *_ = made(Attention({"is_causal": True}))
    with pytest.raises(ValueError, match="attn_mask"):
        sparse(*sequences(7) * 3)


@small
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_of_integers_are_refused_as_by_torch(name: str, need_weights: bool) -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    sparse, _, _ = made(plain)
    x = torch.randn(2, 3, WIDTH)
    mask = torch.ones(3, 3) if name == "attn_mask" else torch.ones(2, 3)
    for layer in (plain, sparse):
        with pytest.raises((TypeError, AssertionError, RuntimeError), match="bool"):
            layer(x, x, x, need_weights=need_weights, **{name: mask.long()})


def _trained(model: nn.Module, config: tk.TopKastConfig) -> Any:
    def loss(apply: Any, inputs: Any) -> Tensor:
        return apply(*inputs)[0].square().mean()

    state, optimizer = tk.init_state(model, config, tk.sgd(0.1)), tk.sgd(0.1)
    step = tk.make_train_step(model, loss, config, optimizer, compile=False)
    return lambda *inputs: step(state, inputs)


def _sparsified(model: nn.Module, config: tk.TopKastConfig) -> Any:
    tk.sparsify(model, config)
    return model


def _for_inference(model: nn.Module, config: tk.TopKastConfig) -> Any:
    return made(model, config)[0]


WAYS = {"step": _trained, "loop": _sparsified, "inference": _for_inference}
OF_SAMPLES = {
    "samples for heads": ("attn_mask", (4, 7, 7)),
    "one line": ("attn_mask", (1, 7)),
    "one column": ("attn_mask", (7, 1)),
    "one sample": ("key_padding_mask", (1, 7)),
    "one key": ("key_padding_mask", (4, 1)),
    "a key too many": ("key_padding_mask", (4, 8)),
}


@small
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "shape"), OF_SAMPLES.values(), ids=OF_SAMPLES.keys())
def test_masks_that_do_not_fit_are_refused_as_by_torch(
    way: str, name: str, shape: tuple[int, ...]
) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    model = Attention({"need_weights": False, name: mask}, batch_first=True)
    x = torch.randn(4, 7, WIDTH)
    with pytest.raises((RuntimeError, AssertionError), match="shape"):
        model(x, x, x)
    run = WAYS[way](model, tk.TopKastConfig(0.9))
    with pytest.raises((RuntimeError, AssertionError, ValueError), match="shape"):
        run(x, x, x)


@small
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_in_words() -> None:
    sparse, *_ = made(Attention({"need_weights": False}, batch_first=True))
    x = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(5, WIDTH)])
    with pytest.raises(TypeError, match="inputs of nested tensors are not supported"):
        sparse(x, x, x)


@small
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_weights_of_attention_under_autocast_are_of_the_dtype_of_torch(name: str) -> None:
    options = {name: torch.randn(3, 3)}
    sparse, plain, _ = made(Attention(options, batch_first=True))
    x = torch.randn(3, 3, WIDTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (y, weights), (expected, expected_weights) = sparse(x, x, x), plain(x, x, x)
    assert (y.dtype, weights.dtype) == (expected.dtype, expected_weights.dtype)
    assert_close(weights, expected_weights, rtol=0.05, atol=0.05)


@small
@pytest.mark.parametrize("batch_first", [True, False])
def test_inputs_of_attention_that_do_not_go_together_are_refused(batch_first: bool) -> None:
    sparse, plain, _ = made(Attention({"need_weights": False}, batch_first=batch_first))
    x, longer, one = (torch.randn(*s, WIDTH) for s in ((4, 7), (4, 9), (1, 7)))
    for inputs in ((x, x, longer), (x, one, one), (x, x[0], x[0]), (x[0, 0],) * 3):
        turned = [t if batch_first or t.dim() < 3 else t.transpose(0, 1) for t in inputs]
        with pytest.raises((RuntimeError, AssertionError)):
            plain(*turned)
        with pytest.raises(ValueError, match="query, key and value are of shapes"):
            sparse(*turned)


@small
def test_what_is_asked_of_the_output_projection_is_left_out_as_by_torch() -> None:
    """It reads the weight of that, and calls neither it nor its hooks."""
    model = Attention({"need_weights": False}, batch_first=True)
    model.attention.out_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    sparse, plain, _ = made(model, tk.TopKastConfig(0.9, keep_dense="*out_proj*"))
    (x,) = sequences(7)
    with torch.no_grad():
        assert_close(sparse(x, x, x), plain(x, x, x))


@small
def test_projections_of_which_some_are_dense() -> None:
    for keep, count in (("*in_proj*", 1), ("*out_proj*", 3)):
        config = tk.TopKastConfig(0.9, keep_dense=keep)
        sparse, plain, _ = made(Attention({}, batch_first=True), config)
        assert len(layers(sparse)) == count
        (x,) = sequences(7)
        with torch.no_grad():
            assert_close(sparse(x, x, x), plain(x, x, x))


@small
@pytest.mark.parametrize("block", [(1, 1), (8, 4), (3, 4)])
def test_projections_in_blocks(block: tuple[int, int]) -> None:
    """Those of three rows do not divide one projection."""
    config = tk.TopKastConfig(0.9, block_shape=block, keep_dense="*out_proj*")
    sparse, plain, _ = made(Attention({}, batch_first=True), config)
    assert {part.values.ndim for part in layers(sparse)} == {3 if block == (8, 4) else 1}
    (x,) = sequences(7)
    with torch.no_grad():
        assert_close(sparse(x, x, x), plain(x, x, x))


@small
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformers_of_torch() -> None:
    model = nn.Transformer(WIDTH, 4, 1, 1, 64, batch_first=True)
    sparse, plain, _ = made(model)
    assert sum(isinstance(part, SparseAttention) for part in sparse.modules()) == 3
    assert len(layers(sparse)) == 3 * 4 + 2 * 2
    source, target = sequences(7, 5)
    with torch.no_grad():
        assert_close(sparse(source, target), plain(source, target))
        masked = {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
        assert_close(sparse(source, target, **masked), plain(source, target, **masked))


@small
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (4, 8)])
def test_tied_embeddings_look_up_what_the_output_layer_stores(block: tuple[int, int]) -> None:
    sparse, plain, state = made(Language(), tk.TopKastConfig(0.8, block_shape=block))
    assert isinstance(sparse.words, SparseEmbedding)
    for name in ("values", "crow_indices", "col_indices"):
        assert getattr(sparse.words, name) is getattr(sparse.head, name)
    assert len(layers(sparse)) == 2
    words = torch.randint(0, 40, (3, 9))
    with torch.no_grad():
        assert torch.equal(sparse.words(words), plain.words(words))  # type: ignore[operator]
        assert_close(sparse(words), plain(words))
        assert_close(torch.vmap(sparse)(words), plain(words))
        assert sparse.words(words[:0]).shape == (0, 9, WIDTH)
    assert torch.equal(sparse.words.weight, tk.forward_params(state)["words.weight"])
    converted = sparse.double()
    assert converted.words.values is converted.head.values


@small
@pytest.mark.parametrize("block", [(1, 1), (4, 8)])
def test_tied_embeddings_are_differentiated_where_they_look_up_too(block: tuple[int, int]) -> None:
    sparse, plain, _ = made(Language().double(), tk.TopKastConfig(0.8, block_shape=block))
    words, head = torch.randint(0, 40, (3, 9)), sparse.get_submodule("head")
    alpha, values = plain.get_parameter("words.weight").detach(), head.get_parameter("values")

    def loss(values: Tensor) -> Tensor:
        y: Tensor = functional_call(sparse, {"head.values": values}, (words,))
        assert sparse.get_parameter("words.values") is head.get_parameter("values")
        return y.square().mean()

    def dense_loss(alpha: Tensor) -> Tensor:
        given = {"words.weight": alpha, "head.weight": alpha}
        y: Tensor = functional_call(plain, given, (words,))
        return y.square().mean()

    numbered = torch.arange(1, values.numel() + 1).view_as(values).double()
    index = head.get_buffer("crow_indices"), head.get_buffer("col_indices")
    places = dense_matrix(numbered, *index, (40, WIDTH)).long()
    expected = grad(dense_loss)(alpha)[places > 0]
    compiled = torch.compile(grad(loss), backend="aot_eager")
    for found in (grad(loss)(values.detach()), compiled(values.detach())):
        assert_close(found.flatten()[places[places > 0] - 1], expected)
    moved, gradient = torch.randn_like(values), grad(loss)(values.detach())
    assert_close(jvp(loss, (values.detach(),), (moved,))[1], (gradient * moved).sum())
    assert head.get_parameter("values") is values
    by_hand = values.detach().clone().requires_grad_()
    loss(by_hand).backward()  # type: ignore[no-untyped-call]
    assert_close(by_hand.grad, gradient)


@small
@pytest.mark.parametrize("options", [{"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
def test_gradients_of_tied_embeddings_are_those_of_their_options(options: dict[str, Any]) -> None:
    model = Language()
    model.words = nn.Embedding(40, WIDTH, **options)
    model.head.weight = model.words.weight
    with torch.no_grad():
        model.words.weight[3] = 5.0
    sparse, plain, _ = made(model)
    assert isinstance(sparse.words, SparseEmbedding) is ("padding_idx" in options)
    words, inside = torch.tensor([[3, 3, 1], [1, 7, 1]]), plain.get_parameter("words.weight") != 0
    for module in (sparse, plain):
        module.requires_grad_(True)
        module.get_submodule("words")(words).square().sum().backward()
    expected = plain.get_parameter("words.weight").grad
    found = sparse.get_submodule("words")
    if isinstance(found, SparseEmbedding):
        shape = (40, WIDTH)
        gradient = dense_matrix(found.values.grad, found.crow_indices, found.col_indices, shape)  # type: ignore[arg-type]
        assert gradient.any()
        assert_close(gradient[inside], expected[inside])  # type: ignore[index]
        assert not gradient[3].any()


@small
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_of_padded_embeddings_has_their_gradients(recorded: bool) -> None:
    model = Language()
    model.words = nn.Embedding(40, WIDTH, padding_idx=3)
    model.head.weight = model.words.weight
    sparse, *_ = made(model)
    words = sparse.get_submodule("words").requires_grad_(True)
    assert isinstance(words, SparseEmbedding)
    inputs, gradients = torch.tensor([[3, 3, 1], [1, 7, 1]]), []
    with torch.set_grad_enabled(recorded):
        traced: Any = torch.jit.trace(words, inputs)  # type: ignore[no-untyped-call]
    for run in (traced, words):
        found = run(inputs)
        gradients.append(torch.autograd.grad(found.square().sum(), words.values)[0])
    assert torch.equal(*gradients)
    sparse_traced: Any = torch.jit.trace(sparse, inputs)  # type: ignore[no-untyped-call]
    assert_close(sparse_traced(inputs[:, :2]), sparse(inputs[:, :2]))


@small
@pytest.mark.parametrize("count", [5, 200])
def test_values_that_do_not_go_with_the_indices_are_not_looked_up(count: int) -> None:
    sparse, *_ = made(Language())
    words = sparse.get_submodule("words")
    words.values = nn.Parameter(torch.ones(count))
    with pytest.raises(ValueError, match=f"{count} values do not go with .* col_indices"):
        words(torch.tensor([1, 2]))


@small
@pytest.mark.parametrize("number", [-1, 40])
def test_words_that_are_not_there_are_refused(number: int) -> None:
    sparse, *_ = made(Language())
    with pytest.raises(IndexError, match=r"indices must be in \[0, 40\)"):
        sparse(torch.tensor([3, number]))


@small
def test_a_language_model_of_hugging_face() -> None:
    sizes: dict[str, Any] = {"n_positions": 16, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, bos_token_id=0, eos_token_id=0, **sizes))
    sparse, plain, _ = made(model, tk.TopKastConfig(0.8))
    assert len(layers(sparse)) == 2 * 4 + 1
    words = torch.randint(0, 40, (3, 9))
    with torch.no_grad():
        assert_close(sparse(words).logits, plain(words).logits)


class Scaled(nn.Embedding):
    """An embedding that does more than to look up."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@small
@pytest.mark.parametrize("embedding", [Scaled(40, WIDTH), nn.Embedding(40, WIDTH, max_norm=1.0)])
def test_a_weight_that_something_else_reads_stays_dense(embedding: nn.Embedding) -> None:
    model = Language()
    model.words = embedding
    model.head.weight = embedding.weight
    sparse, plain, _ = made(model)
    assert [part.in_features for part in layers(sparse)] == [WIDTH]
    assert sparse.head.weight is sparse.words.weight  # type: ignore[union-attr]
    words = torch.randint(0, 40, (3, 9))
    with torch.no_grad():
        assert_close(sparse(words), plain(words))


@small
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("storage", ["compact", "dense"])
def test_convolutions_of_one_pixel(kind: Any, stride: int, storage: Any) -> None:
    model = nn.Sequential(kind(8, 16, 1, stride), nn.ReLU(), kind(16, 4, 1, bias=False))
    sparse, plain, _ = made(model, storage=storage)
    assert len(layers(sparse)) == 2
    x = torch.randn(3, 8, *[5] * (len(model[0].stride)))  # type: ignore[arg-type]
    with torch.no_grad():
        assert_close(sparse(x), plain(x))
        assert_close(sparse(x[0]), plain(x[0]))


@small
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_what_is_no_image_is_refused_as_it_was_given(kind: Any) -> None:
    sparse, plain, _ = made(nn.Sequential(kind(8, 16, 1)))
    names = ("depth", "height", "width")[-AXES[kind] :]
    axes = [5] * len(names)
    taken = f"[batch, 8, {', '.join(names)}], or that without batch"
    shapes: list[list[int]] = [[2, 3, 8, *axes], [8, *axes[1:]], [8], [], [2, *axes, 8], [*axes, 8]]
    for shape in (*shapes, [2, 7, *axes], [7, *axes]):
        x, given = torch.randn(shape), tuple(shape)
        told = re.escape(f"inputs of shape {given} do not fit a convolution that takes {taken}")
        with pytest.raises(RuntimeError):
            plain(x)
        with pytest.raises(ValueError, match=told):
            sparse(x)
    with pytest.raises(TypeError, match=r"inputs of layout torch\.sparse_coo are not supported"):
        sparse(torch.randn(2, 8, *axes).to_sparse())


@small
@pytest.mark.parametrize("options", [{"kernel_size": 3}, {"padding": 1}, {"groups": 2}], ids=str)
def test_other_convolutions_stay(options: dict[str, Any]) -> None:
    sparse, plain, _ = made(nn.Sequential(nn.Conv2d(8, 16, **{"kernel_size": 1, **options})))
    assert layers(sparse) == []
    x = torch.randn(3, 8, 5, 5)
    assert_close(sparse(x), plain(x))


@small
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (encoder(), sequences(7)),
        (encoder(activation=nn.functional.silu), sequences(7)),
        (Attention({"need_weights": False}, batch_first=True), sequences(7) * 3),
        (Language(), [torch.randint(0, 40, (3, 9))]),
        (nn.Sequential(nn.Conv2d(16, 32, 1)), [torch.randn(3, 16, 5, 5)]),
    ],
    ids=["encoder", "silu", "attention", "language", "convolution"],
)
def test_they_compile_export_and_are_smaller(
    model: nn.Module, inputs: list[Tensor], tmp_path: Path
) -> None:
    sparse, plain, _ = made(model)
    expected = plain(*inputs)
    with torch.no_grad():
        fast = torch.compile(sparse, fullgraph=True, backend="aot_eager")
        assert_close(fast(*inputs), expected)
    file = io.BytesIO()
    torch.export.save(torch.export.export(sparse, tuple(inputs)), file)
    file.seek(0)
    assert_close(torch.export.load(file).module()(*inputs), expected)
    sizes = []
    for module in (sparse, plain):
        once = {t.data_ptr(): (name, t) for name, t in module.state_dict().items()}
        save_file(dict(once.values()), tmp_path / "tensors")
        sizes.append((tmp_path / "tensors").stat().st_size)
    assert sizes[0] < 0.75 * sizes[1]


class Standardised(nn.Conv2d):
    """A convolution that changes its weight first."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 3.0 * weight, bias)


class Called(nn.Linear):
    """A linear layer with an attribute of its own, which computes more when it is called."""

    gain = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = super().__call__(x)
        return out * self.gain


def hooked(layer: Any) -> Any:
    layer.register_forward_hook(lambda layer, inputs, y: y * 2.0)
    return layer


def with_forward(layer: Any) -> Any:
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1.0
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        lambda: hooked(nn.Linear(WIDTH, WIDTH)),
        lambda: hooked(nn.Conv2d(WIDTH, WIDTH, 1)),
        lambda: with_forward(nn.Conv2d(WIDTH, WIDTH, 1)),
        lambda: with_forward(nn.Linear(WIDTH, WIDTH)),
        lambda: Standardised(WIDTH, WIDTH, 1),
        lambda: Called(WIDTH, WIDTH),
    ],
    ids=["hook", "hook 1×1", "forward 1×1", "forward", "class 1×1", "class"],
)
@small
def test_a_layer_that_does_more_than_its_class_goes_on_doing_so(layer: Any) -> None:
    module, plain, _ = made(nn.Sequential(layer()))
    of_image = isinstance(plain.get_submodule("0"), nn.Conv2d)
    x = torch.randn(3, WIDTH, 5, 5) if of_image else torch.randn(3, WIDTH)
    assert_close(module(x), plain(x))


@small
def test_a_tied_embedding_with_a_hook_stays_with_its_output_layer() -> None:
    model = Language()
    hooked(model.words)
    module, plain, _ = made(model)
    words = torch.arange(12).view(3, 4)
    assert_close(module(words), plain(words))


@small
def test_a_parametrised_bias_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1))
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    module, plain, _ = made(model)
    x = torch.randn(3, WIDTH, 5, 5)
    assert_close(module(x), plain(x))


@small
def test_a_bias_that_is_a_buffer_is_kept() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Flatten(), nn.Linear(24, 8))
    for layer in (model[0], model[2]):
        bias = layer.get_parameter("bias").detach()
        del layer.bias
        layer.register_buffer("bias", bias)
    sparse, plain, _ = made(model)
    assert len(layers(sparse)) == 2
    x = torch.randn(2, 8, 3)
    assert_close(sparse(x), plain(x))


class Listed(nn.Module):
    """Calls its layers out of a list, or a dictionary, that torch does not know of."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.steps: Any = [self.first] if kind is list else {"first": (self.first,)}

    def forward(self, x: Tensor) -> Tensor:
        (first,) = self.steps if isinstance(self.steps, list) else self.steps["first"]
        y: Tensor = self.last(first(x))
        return y


@small
@pytest.mark.parametrize("kind", [list, dict])
def test_a_layer_that_a_list_holds_too_stays_the_one_that_is_called(kind: type) -> None:
    one, other = (made(Listed(kind), tk.TopKastConfig(0.9))[0] for _ in range(2))
    assert type(one.first) is nn.Linear
    assert type(one.last) is tk.SparseLinear
    x = torch.randn(3, WIDTH)
    first = other.get_submodule("first")
    one.get_submodule("first").load_state_dict(first.state_dict())
    assert_close(one(x), one.get_submodule("last")(first(x)))
    assert one.double()(x.double()).dtype == torch.float64


@small
def test_a_model_may_ask_its_parameters_where_it_is() -> None:
    sparse, *_ = made(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
    assert len(layers(sparse)) == 2
    assert next(sparse.double().parameters()).dtype == torch.float64
    assert not any(parameter.requires_grad for parameter in sparse.parameters())


def test_a_module_without_values_is_named() -> None:
    with pytest.raises(ValueError, match="'weight' is on the meta device, without values"):
        tk.sparse_module(nn.Linear(4, 4, device="meta"))


@pytest.mark.usefixtures("small_layers_pay")
def test_the_blocks_of_a_weight_that_is_transposed_are_transposed() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:2, :4] = mask[4:6, 4:] = True
    alpha = torch.where(mask, torch.randn(8, 8), 0.0)
    stored = Stored({"weight": alpha}, {"weight": mask}, {"weight": torch.zeros(4, 2, 4)}, batch=4)
    layer = stored.linear("weight", None, transposed=True)
    assert layer is not None
    assert layer.values.shape == (2, 4, 2)
    assert torch.equal(layer.weight, alpha.t())


class Centred(nn.Module):
    """A layer of what differs from a running mean that is not saved."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        out: Tensor = self.layer(x - self.mean)
        return out


def test_buffers_that_are_not_saved_are_those_of_the_state() -> None:
    model, config, optimizer = Centred(), tk.TopKastConfig(0.8), tk.sgd(0.1)
    step = tk.make_train_step(model, lambda f, x: f(x).mean(), config, optimizer, compile=False)
    x = torch.randn(16, 8) + 3.0
    state, _ = step(tk.init_state(model, config, optimizer), x)
    assert state.buffers["mean"].all()
    module = tk.sparse_module(state, model)
    assert torch.equal(module.get_buffer("mean"), state.buffers["mean"])
    expected = torch.func.functional_call(model.eval(), tk.forward_params(state), (x,))
    assert_close(module(x), expected)
    module.get_buffer("mean").zero_()
    assert state.buffers["mean"].all()


AXES: dict[Any, int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


@small
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", AXES)
def test_a_convolution_leaves_memory_in_the_order_in_which_torch_does(
    kind: Any, stride: int
) -> None:
    module, plain, _ = made(nn.Sequential(kind(8, 16, 1, stride)))
    x = torch.randn(3, 8, *[5] * AXES[kind])
    last = torch.channels_last if kind is nn.Conv2d else torch.contiguous_format
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for given in (x, x.to(memory_format=last), x[0], x.to(memory_format=last)[0], turned):
        with torch.no_grad():
            found, expected = module(given), plain(given)
        assert_close(found, expected, check_stride=True)
    if kind is nn.Conv3d:  # torch itself keeps the order with strides alone
        found = module(x.to(memory_format=torch.channels_last_3d))
        assert found.is_contiguous(memory_format=torch.channels_last_3d)


@small
@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Language(), ["words", "middle", "head"]),
        (nn.Sequential(nn.Conv2d(8, 16, 1, 2)), ["0"]),
        (Attention({}), ["attention"]),
    ],
    ids=["language", "convolution", "attention"],
)
def test_what_stands_for_a_layer_has_its_attributes(model: nn.Module, names: list[str]) -> None:
    for name in names:
        model.get_submodule(name).told = "by its owner"  # type: ignore[assignment]
    module, plain, _ = made(model)
    for name in names:
        layer, by = plain.get_submodule(name), module.get_submodule(name)
        assert type(by) is not type(layer)
        for key, value in vars(layer).items():
            if not key.startswith("_"):
                assert getattr(by, key) == value
        for key in ("weight", "bias", "in_proj_weight"):
            if isinstance(value := getattr(layer, key, None), Tensor) and name != "middle":
                assert torch.equal(getattr(by, key), value)
