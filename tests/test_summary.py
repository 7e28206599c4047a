"""The table of parameters, the count of operations, what a refresh did, and who is told."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import topkast_func as tk
from topkast_func.report.table import some

BYTES = "bytes: values, where they stand, and slots of the optimiser"
CONFIG = tk.TopKastConfig(0.75, 0.5, refresh_every=2)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8))


def mse(apply: Any, batch: Tensor) -> Tensor:
    return apply(batch).square().mean()


def trained(steps: int, *callbacks: tk.Callback) -> tk.TrainState:
    model, optimizer = network(), tk.adam(0.1)
    state = tk.init_state(model, CONFIG, optimizer)
    step = tk.make_train_step(model, mse, CONFIG, optimizer, compile=False)
    batches = torch.randn(steps, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return tk.train(step, state, batches, CONFIG, callbacks)


def test_a_row_for_every_parameter_with_its_counts_and_bytes() -> None:
    rows = {row.name: row for row in tk.summary(trained(3), batch_size=5).rows}
    assert list(rows) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    linear = rows["3.weight"]
    assert (linear.shape, linear.forward, linear.backward) == ((8, 16), 32, 64)
    assert (linear.forward_density, linear.backward_density) == (0.25, 0.5)
    index = 4 * (8 + 1 + 32 + 8 + 1 + 32 + 16 + 1 + 32 + 32)
    assert linear.bytes == 3 * 4 * 64 + index
    conv = rows["0.weight"]
    assert (conv.forward, conv.backward) == (18, 36)
    index = 4 * (4 + 1 + 18 + 4 + 1 + 18 + 18 + 1 + 18 + 18)
    assert conv.bytes == 3 * 4 * 36 + index
    assert conv.engine == "numba"
    bias = rows["3.bias"]
    assert (bias.engine, bias.reason, bias.bytes) == ("torch", "one dimension", 3 * 4 * 8)


@pytest.mark.parametrize(
    ("name", "leaf", "options", "reason"),
    [
        (
            "a.weight",
            torch.ones(8, 3),
            {"block_shape": (4, 4)},
            "block_shape=(4, 4) does not divide it",
        ),
        ("a.weight", torch.ones(8, 8), {"keep_dense": "a.*"}, "keep_dense"),
        ("a.weight", torch.ones(8, 8), {"sparse": "b.*"}, "not in sparse="),
        ("a.weight", torch.ones(8, 8), {"method": tk.dense()}, "the method is dense"),
        ("a.weight", torch.ones(8, dtype=torch.complex64), {}, "complex numbers"),
        ("a.bias", torch.ones(8), {}, "one dimension"),
        ("a.scale", torch.ones(()), {}, "a number"),
        ("a.table", torch.ones(8, 8), {}, 'its name does not end in "weight"'),
    ],
)
def test_a_dense_parameter_has_the_reason(
    name: str, leaf: Tensor, options: dict[str, Any], reason: str
) -> None:
    config = replace(CONFIG, **options)
    state = tk.init_state({name: leaf, "b.weight": torch.randn(8, 8)}, config, tk.sgd(0.1))
    rows = {row.name: row for row in tk.summary(state, config=config).rows}
    assert (rows[name].reason, rows[name].forward_density) == (reason, 1.0)
    assert f"{name}" in tk.summary(state, config=config).notes[0]
    assert reason in tk.summary(state, config=config).notes[0]


def test_without_the_configuration_the_reason_is_what_can_be_seen() -> None:
    config = replace(CONFIG, keep_dense="1.*")
    state = tk.init_state(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), config, tk.sgd(0.1))
    reasons = {row.name: row.reason for row in tk.summary(state).rows}
    assert reasons["1.weight"] == "left out by the configuration"
    assert reasons["1.bias"] == "one dimension"


class Language(nn.Module):
    """An embedding tied to the output, another one, a position table, a convolution."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(40, 8), nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))
        self.mix = nn.Conv1d(8, 8, 3)
        self.head = nn.Linear(8, 40, bias=False)
        if tied:
            self.head.weight = self.words.weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("facade", [False, True])
def test_what_is_sparse_by_default_and_often_kept_dense_is_named(tied: bool, facade: bool) -> None:
    def warned(config: tk.TopKastConfig) -> list[str]:
        model = Language(tied)
        if facade:
            told = tk.sparsify(model, config).summary()
        else:
            told = tk.summary(tk.init_state(model, config, tk.sgd(0.1)), 8, "auto", model, config)
        return [note for note in told.notes if "by default" in note]

    heads = [] if tied else ["head.*"]
    words = "words.weight (tied)" if tied else "words.weight (embedding)"
    head = "" if tied else ", head.weight (output layer)"
    told = f"{words}, places.weight (embedding){head}"
    assert warned(CONFIG) == [f"warning: sparse by default, keep_dense= leaves them dense: {told}"]
    assert warned(replace(CONFIG, keep_dense=("words.*", "places.*", *heads))) == []
    assert warned(replace(CONFIG, sparse="*.weight")) == []


def test_what_no_kernel_computes_is_named_by_family() -> None:
    model = nn.Sequential(*[nn.Conv3d(8, 8, 1) for _ in range(12)], nn.Linear(8, 8))
    state = tk.init_state(model, CONFIG, tk.sgd(0.1))
    warned = [note for note in tk.summary(state).notes if "kernel" in note]
    told = "all of α: of no layer that kernels know: *.weight (12)"
    assert warned == [f"warning: on no kernel, {told}"]
    state = tk.init_state(model, CONFIG, tk.sgd(0.1), storage="dense")
    warned = [note for note in tk.summary(state).notes if "kernel" in note]
    assert warned == ["warning: on no kernel, all of α: storage='dense': *.weight (13)"]
    half = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).half()
    warned = [note for note in tk.sparsify(half, CONFIG).summary().notes if "kernel" in note]
    told = "all of α: numba takes float32, float64, bfloat16, not float16: *.weight (2)"
    assert warned == [f"warning: on no kernel, {told}"]


def test_rows_and_columns_without_an_entry_are_counted() -> None:
    weight = torch.zeros(4, 6)
    weight[1, 2:4], weight[3, 2] = 1.0, 1.0
    config = tk.TopKastConfig(1 - 3 / 24, 0.5, sparse="w")
    told = tk.summary(tk.init_state({"w": weight}, config, tk.sgd(0.1)))
    assert (told.rows[0].empty_rows, told.rows[0].empty_columns) == (2, 4)
    assert told.notes == [
        "warning: rows without an entry in A, so outputs without an input where weights are "
        "[out, in]: w 2 of 4",
        "columns without an entry in A, so inputs without an effect where weights are [out, in]: "
        "w 4 of 6",
        BYTES,
    ]
    full = tk.TopKastConfig(0.0, 0.0, sparse="w")
    assert tk.summary(tk.init_state({"w": weight}, full, tk.sgd(0.1))).notes == [BYTES]


class Tied(nn.Module):
    """An embedding of 6 tokens in 4 numbers, which is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.words.weight


OUTPUTS = "warning: {} without an entry in A, so outputs without an input: {} of {}"
INPUTS = "{} without an entry in A, so inputs without an effect: {} of {}"


@pytest.mark.parametrize("facade", [False, True])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: nn.Linear(4, 6),
            [(OUTPUTS, "rows", "weight 1", 6), (INPUTS, "columns", "weight 2", 4)],
        ),
        (
            partial(Conv1D, 4, 6),
            [(OUTPUTS, "columns", "weight 2", 4), (INPUTS, "rows", "weight 1", 6)],
        ),
        (
            lambda: nn.Embedding(6, 4),
            [(OUTPUTS, "columns", "weight 2", 4), (INPUTS, "rows", "weight 1", 6)],
        ),
        (
            lambda: nn.Conv2d(4, 6, 3),
            [(OUTPUTS, "rows", "weight 1", 6), (INPUTS, "columns", "weight 2", 4)],
        ),
        (
            lambda: nn.ConvTranspose2d(6, 4, 3),
            [(OUTPUTS, "columns", "weight 2", 4), (INPUTS, "rows", "weight 1", 6)],
        ),
        (
            lambda: nn.Conv1d(8, 6, 3, groups=2),
            [(OUTPUTS, "rows", "weight 1", 6), (INPUTS, "columns", "weight 4", 8)],
        ),
        (
            lambda: nn.GRUCell(4, 2, bias=False),
            [(OUTPUTS, "rows", "weight_ih 1", 6), (INPUTS, "columns", "weight_ih 2", 4)],
        ),
        (
            Tied,
            [
                (OUTPUTS, "columns", "words.weight 2", 4),
                (OUTPUTS, "rows", "words.weight 1", 6),
                (INPUTS, "rows", "words.weight 1", 6),
                (INPUTS, "columns", "words.weight 2", 4),
            ],
        ),
    ],
    ids=["linear", "conv1d", "embedding", "conv", "transposed", "groups", "gru", "tied"],
)
def test_outputs_without_an_input_are_those_of_the_layer(
    make: Any, expected: list[Any], facade: bool
) -> None:
    model = make()
    weight = next(p for p in model.parameters() if p.ndim > 1)
    with torch.no_grad():
        weight[3], weight[:, 1], weight[:, 2] = 0.0, 0.0, 0.0
    name = expected[0][2].split()[0]
    share = float((weight == 0).float().mean())
    config = tk.TopKastConfig(share, 0.0, sparse=name)
    if facade:
        told = tk.sparsify(model, config).summary()
    else:
        told = tk.summary(tk.init_state(model, config, tk.sgd(0.1)), model=model)
    found = [note for note in told.notes if "without an entry" in note]
    assert found == [words.format(*rest) for words, *rest in expected]


def test_a_sparse_vector_has_no_lines() -> None:
    state = tk.init_state(nn.Linear(4, 8), tk.TopKastConfig(sparse="bias"), tk.sgd(0.1))
    assert not [note for note in tk.summary(state).notes if "without" in note]


def test_a_list_says_how_many_it_leaves_out() -> None:
    assert some(["a", "b", "c", "d"]) == "a, b, c, d"
    assert some(["a", "b", "c", "d", "e"]) == "a, b, c, d and 1 more"


@pytest.mark.parametrize("columns", [80, 100])
def test_tables_are_as_wide_as_the_terminal_and_have_one_line_a_row(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    name = "encoder.layers.7.attention.self_attention.projection_of_the_query.weight"
    params = {name: torch.randn(1024, 1024), "mixed.weight": torch.randn(64, 64).half()}
    state = tk.init_state(params, tk.TopKastConfig(0.99), tk.adamw(0.1))
    table, *notes = repr(tk.summary(state)).split("\nwarning")
    lines = table.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) == columns
    assert lines[1].startswith("…")
    assert name.endswith(lines[1].split()[0][1:])
    assert lines[1].split()[1:] == [
        "1024×1024", "10,486", "20,972", "1.0%", "2.0%", "numba", "432k",
    ]  # fmt: skip
    assert all(len(line) <= columns for note in notes for line in note.splitlines())
    tk.explain(state)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= columns
    assert lines[2].endswith("numba takes float32, float64, bfloat16, not float16")


def test_the_table_prints_as_text_and_as_html() -> None:
    summary = tk.summary(trained(1))
    assert "3.weight" in repr(summary)
    assert "8×16" in repr(summary)
    html = summary._repr_html_()
    assert html.count("<tr>") == 5
    assert html.count("<p>") == len(summary.notes) == 3
    assert summary.notes[-1] == BYTES
    assert BYTES in repr(summary)
    told = tk.sparsify(network(), CONFIG).summary()
    assert told.notes[-1].startswith("bytes: parameters and sets; ")
    sizes = {row.name: row.bytes for row in told.rows}
    assert sizes == {"0.weight": 72 * 4 + 18, "0.bias": 16, "3.weight": 128 * 4 + 32, "3.bias": 32}
    assert "<td>25.0%</td>" in html


def test_names_with_brackets_are_whole_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    params = {"blocks[i].weight": torch.randn(8, 8), "[/a]": torch.randn(8)}
    state = tk.init_state(params, tk.TopKastConfig(), tk.sgd(0.1))
    assert all(name in repr(tk.summary(state)) for name in params)


def test_names_are_escaped_in_html() -> None:
    state = tk.init_state({"<b>weight": torch.randn(4, 4)}, CONFIG, tk.sgd(0.1))
    assert "&lt;b&gt;weight" in tk.summary(state)._repr_html_()


def test_operations_of_every_kind_of_product() -> None:
    state = tk.init_state(network(), CONFIG, tk.sgd(0.1))
    found = tk.training_flops(network(), state, torch.zeros(5, 2, 4, 4))
    conv, linear = 2 * 5 * 4 * 2 * 9 * 4, 2 * 5 * 16 * 8
    assert found.dense == 3 * (conv + linear)
    assert found.sparse == pytest.approx((2 * 0.25 + 0.5) * (conv + linear))
    assert found.ratio == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (lambda: nn.LSTM(8, 8), torch.zeros(2, 5, 8), 3 * 2 * (2 * 5 * 8 * 32 + 10 * 8 * 32)),
        (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), torch.zeros(2, 6, 16), 0),
    ],
    ids=["lstm", "encoder"],
)
def test_fused_layers_count_and_the_mode_does_not_matter(
    model: Any, inputs: Tensor, expected: int
) -> None:
    found = []
    for mode in (True, False):
        network = model().train(mode)
        state = tk.init_state(network, tk.TopKastConfig(sparse="*weight*"), tk.sgd(0.1))
        found.append(tk.training_flops(network, state, inputs))
    assert found[0] == found[1]
    assert found[0].sparse < found[0].dense
    assert found[0].dense == (expected or found[0].dense)


def test_counting_operations_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout())
    state = tk.init_state(model, tk.TopKastConfig(), tk.sgd(0.1))
    buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
    random = torch.get_rng_state()
    tk.training_flops(model, state, torch.full((8, 6), 100.0))
    torch.testing.assert_close(state.buffers, buffers, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_without_products_has_no_ratio() -> None:
    model = nn.Embedding(10, 4)
    state = tk.init_state(model, tk.TopKastConfig(), tk.sgd(0.1))
    assert math.isnan(tk.training_flops(model, state, torch.zeros(3, dtype=torch.int64)).ratio)


def test_a_frozen_parameter_has_a_row_and_a_terminal_that_is_wide_enough_shows_long_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    layers = nn.ModuleDict({"a_name_of_forty_characters_" + 200 * "x": model})
    told = tk.summary(tk.init_state(layers, tk.TopKastConfig(), tk.sgd(0.1)))
    frozen = [row for row in told.rows if row.reason == "frozen"]
    assert [(row.forward, row.backward, row.bytes) for row in frozen] == [(24, 0, 0)]
    assert all(row.name in repr(told) for row in told.rows)


def test_operations_without_a_sparse_weight_are_dense() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    state = tk.init_state(layer, CONFIG, tk.sgd(0.1))
    found = tk.training_flops(layer, state, torch.zeros(3, 5, 8))
    weights = 2 * 15 * (3 * 8 * 8 + 8 * 8 + 2 * 8 * 16)
    scores = 2 * 2 * 3 * 5 * 5 * 8
    assert found.dense == 3 * (weights + scores)
    assert found.sparse == pytest.approx(1.0 * weights + 3 * scores)


def test_operations_of_a_pure_function() -> None:
    state = tk.init_state({"weight": torch.randn(8, 8)}, CONFIG, tk.sgd(0.1))
    found = tk.training_flops(lambda p, x: x @ p["weight"].T, state, torch.zeros(4, 8))
    assert found == (2 * 4 * 64, 3 * 2 * 4 * 64)


def masks(forward: str, backward: str) -> tk.Masks:
    return tk.Masks(*(torch.tensor([c == "1" for c in word]) for word in (forward, backward)))


def test_products_with_a_vector_and_with_a_copy_of_the_weight_are_the_weights() -> None:
    state = tk.init_state({"weight": torch.randn(8, 16)}, CONFIG, tk.sgd(0.1))

    def cast(params: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ params["weight"].T

    cases: list[tuple[Any, Tensor, int]] = [
        (lambda params, x: params["weight"] @ x, torch.zeros(16), 1),
        (lambda params, x: torch.addmv(x[:8], params["weight"], x), torch.zeros(16), 1),
        (cast, torch.zeros(4, 16), 4),
        (lambda params, x: x @ params["weight"].T.contiguous(), torch.zeros(4, 16), 4),
    ]
    for model, x, rows in cases:
        found = tk.training_flops(model, state, x)
        assert found == ((2 * 0.25 + 0.5) * 2 * rows * 128, 3 * 2 * rows * 128)


def test_exchanges_count_what_enters_and_where_it_comes_from() -> None:
    before, after = {"w": masks("110000", "111100")}, {"w": masks("001010", "111010")}
    assert tk.exchanges(before, after) == {"w": (2, 1, 1.0)}
    assert tk.exchanges(before, before) == {"w": (0, 0, 0.0)}


def test_the_exploration_rate_is_of_all_that_was_ever_active() -> None:
    seen = tk.explored({"w": masks("1100", "1100")})
    seen = tk.explored({"w": masks("0110", "1110")}, seen)
    assert tk.exploration_rate(seen) == 0.75
    assert tk.exploration_rate({}) == 1.0
    assert tk.exploration_rate({**seen, "v": torch.zeros(4, dtype=torch.bool)}) == 0.375


class Witness(tk.Callback):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_step(self, state: tk.TrainState, metrics: tk.StepMetrics) -> None:
        assert math.isfinite(metrics.loss)
        self.heard.append(f"step {int(state.step)}")

    def on_refresh(self, before: tk.TrainState, after: tk.TrainState) -> None:
        assert int(after.step) == int(before.step) + 1
        self.heard.append(f"refresh {int(before.step)}")


def test_callbacks_hear_of_every_step_and_every_refresh() -> None:
    witness = Witness()
    state = trained(5, tk.Callback(), witness)
    assert int(state.step) == 5
    assert witness.heard == [
        "step 1", "step 2", "refresh 2", "step 3", "step 4", "refresh 4", "step 5",
    ]  # fmt: skip


def test_a_history_keeps_losses_and_what_refreshes_did() -> None:
    history = tk.History()
    state = trained(7, history)
    assert len(history.losses) == 7
    assert [refresh.step for refresh in history.refreshes] == [2, 4, 6]
    rates = [refresh.exploration_rate for refresh in history.refreshes]
    assert 0.25 <= rates[0] <= rates[1] <= rates[2] < 1
    assert rates[2] > 0.25
    assert history.refreshes[0].exchanges.keys() == tk.masks_of(state).keys()
    assert history.refreshes[0].flops is None


def test_a_history_counts_the_operations_of_each_stage() -> None:
    model, optimizer = nn.Linear(20, 10), tk.sgd(0.1)
    sparsities = tk.staged({0: 0.5, 4: 0.9})
    config = tk.TopKastConfig(sparsities, sparsities, refresh_every=2)
    state = tk.init_state(model, config, optimizer)
    step = tk.make_train_step(model, mse, config, optimizer, compile=False)
    history = tk.History(lambda state: tk.training_flops(model, state, torch.zeros(1, 20)))
    tk.train(step, state, torch.ones(5, 3, 20), config, [history])
    assert [r.flops.ratio for r in history.refreshes if r.flops] == pytest.approx([0.5, 0.1])


def test_a_frozen_weight_has_no_gradient_to_count() -> None:
    frozen = nn.Linear(10, 10).requires_grad_(requires_grad=False)
    model = nn.Sequential(nn.Linear(10, 10), frozen)
    state = tk.init_state(model, tk.TopKastConfig(0.9, 0.8), tk.sgd(0.1))
    found = tk.training_flops(model, state, torch.zeros(4, 10))
    assert found == (800 * (2 * 0.1 + 0.2) + 2 * 800, 3 * 800 + 2 * 800)


def test_tensorboard_gets_losses_and_refreshes(tmp_path: Path) -> None:
    dense = tk.TrainingFlops(0.5, 1.0)
    logger = tk.TensorBoardLogger(tmp_path, every=2, flops=lambda state: dense)
    trained(5, logger)
    logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/data_loss")] == [0, 2, 4]
    assert [e.step for e in events.Scalars("churn/3.weight")] == [2, 4]
    assert [e.value for e in events.Scalars("flops/ratio")] == [0.5, 0.5]
    assert {"exploration_rate", "promoted/0.weight"} <= set(events.Tags()["scalars"])


def test_without_tensorboard_the_way_to_get_it_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'topkast_func\[tensorboard\]'"):
        tk.TensorBoardLogger(tmp_path)


def test_a_state_of_another_model_is_named() -> None:
    state = tk.init_state(nn.Linear(8, 4), CONFIG, tk.sgd(0.1))
    with pytest.raises(ValueError, match="the state is of another model: 'weight' has shape"):
        tk.summary(state, model=nn.Linear(4, 8))
