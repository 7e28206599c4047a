"""Trees by name that do not fit what they go with: each is named, with what was given."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import topkast_func as tk

CONFIG = tk.TopKastConfig(0.75, 0.5, method=tk.rigl())
NAME = "0.weight"
BATCH = (torch.linspace(-1, 1, 32).view(4, 8), torch.zeros(4, 3))


def network(**buffers: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    return model


def mse(apply: Any, batch: Any) -> Tensor:
    return functional.mse_loss(apply(batch[0]), batch[1])


MODEL = network()
STATE = tk.init_state(MODEL, CONFIG, tk.sgd(0.1))
PARAMS, MASKS = tk.dense_params(STATE), tk.masks_of(STATE)
INDEXED = tk.index_masks(MODEL, MASKS)
GRADIENTS = tk.dense_gradients(MODEL, mse, STATE, BATCH)
SEEN = tk.explored(MASKS)


def function(params: Any, x: Tensor) -> Tensor:
    hidden = functional.linear(x, params["0.weight"], params["0.bias"])
    return functional.linear(hidden, params["1.weight"], params["1.bias"])


def refreshed(gradients: Any) -> tk.TrainState:
    return tk.refresh(STATE, CONFIG, gradients)


READERS: dict[str, tuple[str, Callable[[Any], Any], Any]] = {
    "sparse_forward": ("params", lambda p: tk.sparse_forward(MODEL, p, MASKS, BATCH[0]), PARAMS),
    "on kernels": ("params", lambda p: tk.sparse_forward(MODEL, p, INDEXED, BATCH[0]), PARAMS),
    "of a function": ("params", lambda p: tk.sparse_forward(function, p, MASKS, BATCH[0]), PARAMS),
    "penalized_loss": (
        "params",
        lambda p: tk.penalized_loss(MODEL, mse, p, MASKS, BATCH, CONFIG),
        PARAMS,
    ),
    "penalty": ("params", lambda p: tk.exploration_penalty(p, MASKS, CONFIG), PARAMS),
    "refresh": ("gradients", refreshed, GRADIENTS),
}
every_reader = pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())

LEAVES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "None": (lambda w: None, TypeError, "must be a tensor, got NoneType"),
    "a list": (lambda w: w.tolist(), TypeError, "must be a tensor, got list"),
    "an array": (lambda w: w.numpy(), TypeError, "must be a tensor, got ndarray"),
    "masks": (lambda w: MASKS[NAME], TypeError, "must be a tensor, got Masks"),
    "integers": (lambda w: w.long(), TypeError, "floating-point dtype, got torch.int64"),
    "bytes": (lambda w: w.to(torch.float8_e5m2), TypeError, "is torch.float8_e5m2, in which"),
    "sparse": (lambda w: w.to_sparse_csr(), TypeError, "layout torch.sparse_csr: give dense"),
    "nested": (
        lambda w: torch.nested.nested_tensor([w]),
        TypeError,
        "has layout nested: give dense",
    ),
    "transposed": (lambda w: w.T, ValueError, r"shape .*\(8, 6\)"),
    "flat": (lambda w: w.flatten(), ValueError, r"shape .*\(48,\)"),
    "a row": (lambda w: w[:1], ValueError, r"shape .*\(1, 8\)"),
    "a number": (lambda w: w[0, 0], ValueError, r"shape .*\(\)"),
    "elsewhere": (lambda w: w.to("meta"), ValueError, "meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@every_reader
@pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES.keys())
def test_a_leaf_that_does_not_fit_is_named(reader: Any, leaf: Any) -> None:
    what, read, tree = reader
    change, error, told = leaf
    with pytest.raises(error, match=rf"{what}\['0.weight'\].*{told}|masks\['0.weight'\].*{told}"):
        read({**tree, NAME: change(tree[NAME])})


@every_reader
@pytest.mark.parametrize("other", [[*PARAMS.values()], PARAMS[NAME], network(), STATE, "abc", 3])
def test_what_is_no_tree_is_named(reader: Any, other: Any) -> None:
    what, read, _ = reader
    kind = type(other).__name__
    with pytest.raises(TypeError, match=f"{what} must map names to tensors, got {kind}"):
        read(other)


@every_reader
def test_names_that_are_no_text_are_told(reader: Any) -> None:
    what, read, tree = reader
    with pytest.raises(TypeError, match=rf"{what} must map names to tensors, got the names \[3\]"):
        read({**tree, 3: tree[NAME]})


@every_reader
def test_names_that_are_missing_are_told(reader: Any) -> None:
    _, read, tree = reader
    with pytest.raises(ValueError, match=r"(missing|unknown parameters:) \['0.weight'\]"):
        read({name: leaf for name, leaf in tree.items() if name != NAME})


def test_gradients_may_be_those_of_all_parameters_and_of_no_others() -> None:
    every = {**{name: torch.zeros_like(p) for name, p in PARAMS.items()}, **GRADIENTS}
    found, expected = (tk.masks_of(refreshed(tree)) for tree in (every, GRADIENTS))
    assert torch.equal(found[NAME].backward, expected[NAME].backward)
    with pytest.raises(ValueError, match=r"dense_gradients.* returns: .* unknown \['x.weight'\]"):
        refreshed({**GRADIENTS, "x.weight": GRADIENTS[NAME]})
    with pytest.raises(TypeError, match=r"gradients\['0.weight'\] is torch.complex64, and the par"):
        refreshed({**GRADIENTS, NAME: GRADIENTS[NAME] + 0j})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_gradients_are_taken_in_any_precision(dtype: torch.dtype) -> None:
    state = refreshed({name: gradient.to(dtype) for name, gradient in GRADIENTS.items()})
    assert tk.masks_of(state)[NAME].forward.sum() == MASKS[NAME].forward.sum()


@pytest.mark.parametrize("model", [MODEL, function], ids=["module", "function"])
@pytest.mark.parametrize("name", [NAME, "1.bias"])
def test_parameters_of_several_kinds_are_named_where_the_model_fails(model: Any, name: str) -> None:
    changed = {**PARAMS, name: PARAMS[name].double()}
    with pytest.raises(ValueError, match=r"params.* is torch.float\d\d of .* params.*one kind"):
        tk.sparse_forward(model, changed, MASKS, BATCH[0])


def test_parameters_of_another_dtype_than_the_module_has_are_run() -> None:
    wide = {name: p.double() for name, p in PARAMS.items()}
    found = tk.sparse_forward(MODEL, wide, MASKS, BATCH[0].double())
    torch.testing.assert_close(found.float(), tk.sparse_forward(MODEL, PARAMS, MASKS, BATCH[0]))
    with pytest.raises(RuntimeError, match="same dtype"):  # the inputs, of which torch tells
        tk.sparse_forward(MODEL, wide, MASKS, BATCH[0])


def test_a_module_of_several_dtypes_fails_as_it_does_by_itself() -> None:
    mixed = network()
    mixed[1].double()  # type: ignore[index]
    params = {name: p.detach() for name, p in mixed.named_parameters()}
    with pytest.raises(RuntimeError, match="same dtype"):
        tk.sparse_forward(mixed, params, MASKS, BATCH[0])


def test_memory_that_runs_out_is_told_as_it_is() -> None:
    def greedy(params: Any, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    changed = {**PARAMS, NAME: PARAMS[NAME].double()}
    with pytest.raises(torch.OutOfMemoryError):
        tk.sparse_forward(greedy, changed, MASKS, BATCH[0])


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_values_for_a_dense_tensor_are_named() -> None:
    def made(name: str, tensor: Tensor) -> Tensor:
        return torch.ones(tensor.shape).to_sparse()

    with pytest.raises(TypeError, match=r"materialize returned for '0.weight' has layout torch.sp"):
        tk.init_state(network().to("meta"), CONFIG, tk.sgd(0.1), materialize=made)


def test_a_bias_of_another_shape_is_named_though_it_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"params\['0.bias'\] has shape \(1,\), the model \(6,\)"):
        tk.sparse_forward(MODEL, {**PARAMS, "0.bias": torch.zeros(1)}, MASKS, BATCH[0])


A, B = MASKS[NAME]
PAIRS: dict[str, tuple[Any, type[Exception], str]] = {
    "a tensor": (A, TypeError, "must be Masks"),
    "a pair": ((A, B), TypeError, "must be Masks"),
    "nothing": (tk.Masks(None, None), TypeError, "must be a tensor, got NoneType"),  # type: ignore[arg-type]
    "numbers": (tk.Masks(A.float(), B), TypeError, "must be of torch.bool, got torch.float32"),
    "sparse": (tk.Masks(A.to_sparse(), B.to_sparse()), TypeError, "layout torch.sparse_coo"),
    "transposed": (tk.Masks(A.T, B.T), ValueError, r"shape \(8, 6\)|\(8, 6\)"),
    "of two shapes": (tk.Masks(A, B[:1]), ValueError, r"has shape \(1, 8\)"),
    "elsewhere": (tk.Masks(A.to("meta"), B.to("meta")), ValueError, "meta"),
}
USES: dict[str, Callable[[Any], Any]] = {
    "sparse_forward": lambda masks: tk.sparse_forward(MODEL, PARAMS, masks, BATCH[0]),
    "penalty": lambda masks: tk.exploration_penalty(PARAMS, masks, CONFIG),
    "index_masks": lambda masks: tk.index_masks(MODEL, masks),
    "init_state": lambda masks: tk.init_state(MODEL, CONFIG, tk.sgd(0.1), masks=masks),
    "before": lambda masks: tk.exchanges(masks, MASKS),
    "after": lambda masks: tk.exchanges(MASKS, masks),
    "explored": lambda masks: tk.explored(masks, SEEN),
}
every_use = pytest.mark.parametrize("use", USES.values(), ids=USES.keys())


@every_use
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_sets_that_do_not_fit_are_named(use: Any, pair: Any) -> None:
    sets, error, told = pair
    with pytest.raises(error, match=rf"(masks|before|after|earlier)\['0.weight'\].*{told}"):
        use({**MASKS, NAME: sets})


@every_use
@pytest.mark.parametrize("other", [[*MASKS.values()], MASKS[NAME], network(), STATE, 3])
def test_what_are_no_sets_by_name_is_named(use: Any, other: Any) -> None:
    with pytest.raises(TypeError, match=f"must map names to Masks.*, got {type(other).__name__}"):
        use(other)


@every_use
def test_sets_of_no_parameter_are_named(use: Any) -> None:
    with pytest.raises(ValueError, match=r"(unknown( parameters:)?|missing) \['x.weight'\]"):
        use({**MASKS, "x.weight": MASKS[NAME]})


SEENS: dict[str, tuple[Any, str]] = {
    "a state": (STATE, "must map names to tensors, got TrainState"),
    "sets": (MASKS, r"\['0.weight'\] must be a tensor, got Masks"),
    "numbers": ({**SEEN, NAME: SEEN[NAME].float()}, r"\['0.weight'\] must be of torch.bool"),
    "elsewhere": ({**SEEN, NAME: SEEN[NAME].to("meta")}, r"\['0.weight'\].* on the meta device"),
}


@pytest.mark.parametrize("case", SEENS.values(), ids=SEENS.keys())
@pytest.mark.parametrize(
    "use", [tk.exploration_rate, lambda seen: tk.explored(MASKS, seen)], ids=["rate", "explored"]
)
def test_what_has_never_been_explored_is_named(case: Any, use: Any) -> None:
    seen, told = case
    with pytest.raises((TypeError, ValueError), match=rf"(explored|earlier).*{told}"):
        use(seen)


def test_nothing_is_exchanged_where_a_set_is_empty() -> None:
    none = {NAME: tk.Masks(A & ~A, B & ~B)}
    assert tk.exchanges(none, none)[NAME] == (0, 0, 0.0)
    assert tk.exploration_rate({}) == 1.0
    assert float(tk.exploration_penalty({}, {}, CONFIG)) == 0.0


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr", "to_sparse_bsc"])
def test_a_sparse_buffer_is_named_at_the_start(layout: str) -> None:
    sides = [(2, 2)] if layout == "to_sparse_bsc" else []
    model = network(graph=getattr(torch.eye(4), layout)(*sides))
    with pytest.raises(TypeError, match=r"'graph' has layout torch.sparse_.* forward pass"):
        tk.init_state(model, CONFIG, tk.sgd(0.1))


@pytest.mark.parametrize("role", ["parameter", "frozen", "buffer"])
def test_a_name_that_no_file_holds_is_named_at_the_start(role: str) -> None:
    model, name = network(), "half\udc80"
    if role == "buffer":
        model.register_buffer(name, torch.zeros(2))
    else:
        trained = role == "parameter"
        model.register_parameter(name, nn.Parameter(torch.zeros(2), requires_grad=trained))
    with pytest.raises(ValueError, match=r"no file holds the name 'half\\udc80'.*: rename it"):
        tk.init_state(model, CONFIG, tk.sgd(0.1))


PATHS: dict[str, Callable[[Any], Any]] = {
    "save": lambda path: tk.save(STATE, path),
    "load": tk.load,
    "load_config": tk.load_config,
    "save_sharded": lambda path: tk.save_sharded(STATE, path),
    "load_sharded": tk.load_sharded,
    "from_safetensors": tk.from_safetensors,
    "TensorBoardLogger": tk.TensorBoardLogger,
    "Best": lambda path: tk.Best(lambda state: 0.0, path=path),
}


@pytest.mark.parametrize("use", PATHS.values(), ids=PATHS.keys())
def test_what_is_no_path_is_named(use: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a str or a pathlib.Path, got TrainState"):
        use(STATE)
    with pytest.raises(ValueError, match="must have no null character, got 'a"):
        use("a\0b")


def test_a_file_in_the_place_of_a_folder_is_named_and_the_other_way_round(tmp_path: Path) -> None:
    tk.save(STATE, tmp_path / "state")
    for path in (tmp_path / "state", tmp_path / "state" / "further"):
        for use in (tk.load_sharded, lambda place: tk.save_sharded(STATE, place)):
            with pytest.raises(NotADirectoryError, match=r"state is a file: load reads what save"):
                use(path)
    with pytest.raises(FileNotFoundError, match=r"is a folder: .*by load_sharded"):
        tk.load(tmp_path)


STEP = tk.make_train_step(MODEL, mse, CONFIG, tk.sgd(0.1), compile=False)
CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "loss_fn": (lambda x: tk.penalized_loss(MODEL, x, PARAMS, MASKS, BATCH, CONFIG), "loss_fn"),
    "dense_gradients": (lambda x: tk.dense_gradients(MODEL, x, STATE, BATCH), "loss_fn"),
    "of no model": (lambda x: tk.dense_gradients(x, mse, STATE, BATCH), "model"),
    "training_flops": (lambda x: tk.training_flops(x, STATE, BATCH[0]), "model"),
    "index_masks": (lambda x: tk.index_masks(x, MASKS), "model"),
    "train": (lambda x: tk.train(x, STATE, [BATCH], CONFIG), "train_step"),
    "Best": (tk.Best, "measure"),
    "History": (tk.History, "flops"),
}


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS.keys())
def test_what_cannot_be_called_is_named(case: Any) -> None:
    use, name = case
    with pytest.raises(TypeError, match=f"^{name} must be callable, got dict"):
        use(PARAMS)


TYPES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "state": (lambda x: tk.train(STEP, x, [BATCH], CONFIG), "state must be a TrainState"),
    "callbacks": (lambda x: tk.train(STEP, STATE, [], CONFIG, x), "callbacks must be a Sequence"),
    "sharded": (lambda x: tk.save_sharded(x, "nowhere"), "state must be a TrainState"),
    "summary": (lambda x: tk.summary(STATE, config=x), "config must be a TopKastConfig"),
    "Best": (lambda x: tk.Best(lambda s: 0.0, config=x), "config must be a TopKastConfig"),
    "master": (lambda x: tk.plan(MODEL, CONFIG, 2, master=x), "master must be torch.float32, "),
    "staged": (tk.staged, "stages must be a Mapping"),
    "from_json": (tk.TopKastConfig.from_json, "text must be a str"),
    "SparseLinear": (tk.SparseLinear, "weight must be a matrix of layout CSR or BSR"),
    "bsr": (lambda x: tk.to_sparse(STATE, "bsr", x), r"block_shape must be a pair \(rows, col"),
}


@pytest.mark.parametrize("case", TYPES.values(), ids=TYPES.keys())
def test_an_argument_of_another_type_is_named(case: Any) -> None:
    use, told = case
    with pytest.raises(TypeError, match=f"^{told}.*got"):
        use(7)


def test_what_is_no_json_or_no_sparse_matrix_is_named() -> None:
    with pytest.raises(ValueError, match="text is no JSON, as to_json returns it: "):
        tk.TopKastConfig.from_json("{")
    with pytest.raises(TypeError, match=r"CSR or BSR, got \(torch.strided, 2\): tk.sparse_module"):
        tk.SparseLinear(torch.ones(2, 2))


def test_a_state_of_another_module_is_named() -> None:
    other = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))
    for use in (
        lambda: tk.dense_gradients(other, mse, STATE, BATCH),
        lambda: tk.training_flops(other, STATE, BATCH[0]),
    ):
        with pytest.raises(ValueError, match=r"the state is of another model: '0.weight' has"):
            use()
