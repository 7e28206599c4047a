"""The command line: what it writes, prints and refuses."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

import topkast_func as tk
from topkast_func import demo
from topkast_func.__main__ import main

CONFIG = tk.TopKastConfig(0.7, 0.5, refresh_every=10, penalty_weight=0.1, method=demo.METHOD)
FILES = ["loss.png", "metrics.json", "state.safetensors"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "make_train_step", partial(tk.make_train_step, compile=False))


def _metrics(out: Path) -> dict[str, Any]:
    """Read metrics.json as strict JSON, which knows no NaN and no infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"metrics.json holds {constant}, which is not JSON")

    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text(), parse_constant=refuse)
    return metrics


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one run of three epochs, for tests that only read it."""
    out: Path = tmp_path_factory.mktemp("run") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "make_train_step", partial(tk.make_train_step, compile=False))
        main(["boston", "--epochs", "3", "--seed", "7", "--out", str(out)])
    return out


@pytest.fixture
def again(_eager: None) -> demo.Run:
    """The same run by hand."""
    return demo.train("boston", CONFIG, 3, 7, "again")


def test_it_writes_three_files_and_nothing_else(results: Path) -> None:
    assert sorted(file.name for file in results.iterdir()) == FILES


def test_the_loss_plot_is_a_png_with_something_drawn(results: Path) -> None:
    assert (results / "loss.png").read_bytes().startswith(PNG)
    pixels = matplotlib.image.imread(results / "loss.png")
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 0.0


def test_the_metrics_are_those_of_the_run(results: Path, again: demo.Run) -> None:
    metrics = _metrics(results)
    assert metrics["options"] == {
        "job": "boston",
        "seed": 7,
        "epochs": 3,
        "forward_sparsity": 0.7,
        "backward_sparsity": 0.5,
        "refresh_every": 10,
        "penalty_weight": 0.1,
        "dense_twin": True,
        "out": str(results),
    }
    assert metrics["train_losses"] == again.train_losses
    assert metrics["validation_losses"] == again.validation_losses
    assert metrics["best_epoch"]["sparse"] == again.best_epoch
    assert metrics["test_mse"]["sparse"] == again.test_mse
    assert metrics["test_mse"]["mean"] == again.mean_mse
    assert metrics["seconds"].keys() == {"sparse", "dense"}


@pytest.mark.usefixtures("_eager")
def test_the_dense_twin_is_the_same_network_without_sparsity(results: Path) -> None:
    dense = tk.TopKastConfig(0.0, 0.0, refresh_every=10, penalty_weight=0.1)
    run = demo.train("boston", dense, 3, 7, "again")
    errors = _metrics(results)["test_mse"]
    assert errors.keys() == {"sparse", "dense", "mean"}
    assert errors["dense"] == run.test_mse
    assert errors["dense"] != errors["sparse"]


def test_the_saved_state_is_the_reported_one(results: Path, again: demo.Run) -> None:
    path, model, optimizer = results / "state.safetensors", demo._network(13, 0), tk.sgd(0.1, 0.9)
    state = tk.load(path, None, model, optimizer)
    assert tk.load_config(path) == CONFIG
    layers = _metrics(results)["layers"]
    rows = [row._asdict() for row in tk.summary(state, demo.BATCH_SIZE).rows]
    assert layers == json.loads(json.dumps(rows))
    for name, masks in tk.masks_of(state).items():
        layer = next(layer for layer in layers if layer["name"] == name)
        assert layer["forward"] == masks.forward.count_nonzero()
        assert layer["backward"] == masks.backward.count_nonzero()
    theta = tk.dense_params(again.state)
    assert all(map(torch.equal, tk.dense_params(state).values(), theta.values()))


@pytest.mark.usefixtures("_eager")
def test_without_the_dense_twin_there_is_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["boston", "--epochs", "1", "--no-dense-twin", "--out", str(tmp_path)])
    metrics = _metrics(tmp_path)
    assert metrics["options"]["dense_twin"] is False
    assert metrics["test_mse"].keys() == {"sparse", "mean"}
    assert metrics["seconds"].keys() == metrics["best_epoch"].keys() == {"sparse"}
    assert "dense" not in capsys.readouterr().err


@pytest.mark.usefixtures("_eager")
def test_the_options_reach_the_training(tmp_path: Path) -> None:
    words = "synthetic --epochs 2 --forward-sparsity 0.9 --backward-sparsity 0.8 --seed 3"
    main([*words.split(), "--refresh-every", "4", "--no-dense-twin", "--out", str(tmp_path)])
    config = replace(CONFIG, forward_sparsity=0.9, backward_sparsity=0.8, refresh_every=4)
    run = demo.train("synthetic", config, 2, 3, "again")
    assert _metrics(tmp_path)["train_losses"] == run.train_losses
    assert tk.load(tmp_path / "state.safetensors", config).step == run.state.step


@pytest.mark.usefixtures("_eager")
def test_the_penalty_weight_reaches_the_training(tmp_path: Path) -> None:
    losses = []
    for weight in ("0", "10"):
        words = ["boston", "--epochs", "2", "--penalty-weight", weight, "--no-dense-twin"]
        main([*words, "--out", str(tmp_path)])
        losses.append(_metrics(tmp_path)["train_losses"])
    assert losses[0] != losses[1]


@pytest.mark.usefixtures("_eager")
def test_the_tables_show_each_layer_and_each_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main(["boston", "--epochs", "1", "--out", str(tmp_path)])
    printed, progress = capsys.readouterr()
    words = printed.split()
    for layer in _metrics(tmp_path)["layers"]:
        line = next(line for line in printed.splitlines() if layer["name"] in line)
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        assert cells[1:4] == [
            " × ".join(map(str, layer["shape"])),
            f"{layer['forward']:,}",
            f"{layer['backward']:,}",
        ]
    errors = _metrics(tmp_path)["test_mse"]
    assert all(f"{error:.4g}" in words for error in errors.values())
    assert "sparse: 100%" in progress
    assert "dense twin: 100%" in progress
    last = printed.splitlines()[-1]
    assert last.startswith("wrote loss.png, metrics.json and state.safetensors to ")


@pytest.mark.usefixtures("_eager")
def test_results_go_to_runs_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["synthetic", "--epochs", "1", "--no-dense-twin"])
    assert sorted(file.name for file in (tmp_path / "runs" / "synthetic").iterdir()) == FILES


@pytest.mark.usefixtures("_eager")
def test_the_words_of_the_process_are_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["topkast_func", "boston", "--epochs", "1", "--no-dense-twin", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    main()
    assert _metrics(tmp_path)["options"]["epochs"] == 1


@pytest.mark.usefixtures("_eager")
def test_a_run_that_diverges_still_writes_its_files(tmp_path: Path) -> None:
    words = ["boston", "--epochs", "2", "--penalty-weight", "1e30", "--no-dense-twin"]
    main([*words, "--out", str(tmp_path)])
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES
    metrics = _metrics(tmp_path)
    assert metrics["train_losses"] == metrics["validation_losses"] == [None, None]
    assert tk.load(tmp_path / "state.safetensors").step == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: job"),
        ("iris", "invalid choice: 'iris'"),
        ("boston --epochs 0", "epochs must be at least 1, got 0"),
        ("boston --epochs 1.5", "invalid int value: '1.5'"),
        ("boston --seed -1", "seed must be at least 0, got -1"),
        ("boston --forward-sparsity 1", "forward_sparsity must be in [0.0, 1.0), got 1.0"),
        ("boston --forward-sparsity nan", "forward_sparsity must be in [0.0, 1.0), got nan"),
        ("boston --backward-sparsity -0.1", "backward_sparsity must be in [0.0, 1.0), got -0.1"),
        (
            "boston --backward-sparsity 0.8",
            "backward_sparsity must be in [0, forward_sparsity=0.7], got 0.8",
        ),
        ("boston --forward-sparsity much", "invalid float value: 'much'"),
        ("boston --refresh-every 0", "refresh_every must be at least 1, got 0"),
        ("boston --penalty-weight -1", "penalty_weight must be in [0.0, inf), got -1.0"),
        ("boston --unknown", "unrecognized arguments: --unknown"),
    ],
)
def test_bad_options_exit_with_a_message_and_write_nothing(
    words: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(words.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_results_should_go_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["boston", "--out", str(tmp_path / "taken")])
    assert "--out: " in capsys.readouterr().err


def test_help_names_the_jobs_the_options_and_their_defaults() -> None:
    command = [sys.executable, "-W", "error", "-m", "topkast_func", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "{boston,synthetic}" in done.stdout
    for option in ("--seed", "--epochs", "--no-dense-twin", "--forward-sparsity", "--out"):
        assert option in done.stdout
    assert "(default: 200)" in done.stdout


def test_boston_at_default_settings_reaches_a_test_error_of_at_most_8(tmp_path: Path) -> None:
    """Compiled, as every run of the command line is; the twin would change no number here."""
    main(["boston", "--no-dense-twin", "--out", str(tmp_path)])
    metrics = _metrics(tmp_path)
    assert metrics["test_mse"]["sparse"] <= 8.0
    assert metrics["test_mse"]["mean"] > 80.0
    assert len(metrics["train_losses"]) == 200
    assert all(map(math.isfinite, metrics["validation_losses"]))
