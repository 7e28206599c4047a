"""The command line: what it writes, prints and refuses."""

import itertools
import json
import math
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

import topkast_func as tk
from tests.eager import eager_step
from topkast_func import __main__ as main_module
from topkast_func import demo
from topkast_func.__main__ import main

CONFIG = tk.TopKastConfig(0.7, 0.5, refresh_every=10, penalty_weight=0.1, method=demo.METHOD)
FILES = ["loss.png", "metrics.json", "state.safetensors"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "make_train_step", eager_step)


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
        patch.setattr(demo, "make_train_step", eager_step)
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
        "method": "topkast",
        "lr": 1e-3,
        "compile": True,
        "overwrite": False,
        "seed": 7,
        "epochs": 3,
        "forward_sparsity": 0.7,
        "backward_sparsity": 0.5,
        "refresh_every": 10,
        "penalty_weight": 0.1,
        "dense_twin": True,
        "out": str(results),
    }
    assert metrics["train_losses"]["sparse"] == again.train_losses
    assert metrics["validation_losses"]["sparse"] == again.validation_losses
    assert metrics["best_epoch"]["sparse"] == again.best_epoch
    assert metrics["test_mse"]["sparse"] == again.test.mean
    assert metrics["test_mse"]["mean"] == again.mean.mean
    assert metrics["validation_mse"]["sparse"] == again.validation.mean
    assert metrics["interrupted"] == {"sparse": False, "dense": False}
    assert metrics["seconds"].keys() == {"sparse", "dense"}
    assert all(times["training"] > 0.0 for times in metrics["seconds"].values())
    assert all(times["compilation"] >= 0.0 for times in metrics["seconds"].values())


@pytest.mark.usefixtures("_eager")
def test_the_dense_twin_is_the_same_network_without_sparsity(results: Path) -> None:
    dense = tk.TopKastConfig(0.0, 0.0, refresh_every=10, penalty_weight=0.1)
    run = demo.train("boston", dense, 3, 7, "again", storage="dense")
    errors = _metrics(results)["test_mse"]
    assert errors.keys() == {"sparse", "dense", "mean"}
    assert errors["dense"] == run.test.mean
    assert _metrics(results)["validation_losses"]["dense"] == run.validation_losses
    assert errors["dense"] != errors["sparse"]


def test_the_saved_state_is_the_reported_one(results: Path, again: demo.Run) -> None:
    path, model, optimizer = results / "state.safetensors", demo._network(13, 0), tk.sgd(0.1, 0.9)
    state = tk.load(path, None, model, optimizer)
    assert tk.load_config(path) == CONFIG
    layers = _metrics(results)["layers"]
    rows = [row._asdict() for row in tk.summary(state, demo.BATCH_SIZE, config=CONFIG).rows]
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
    assert _metrics(tmp_path)["train_losses"]["sparse"] == run.train_losses
    assert tk.load(tmp_path / "state.safetensors", config).step == run.state.step


@pytest.mark.usefixtures("_eager")
def test_the_penalty_weight_reaches_the_training(tmp_path: Path) -> None:
    losses = []
    for weight in ("0", "10"):
        words = ["boston", "--epochs", "2", "--penalty-weight", weight, "--no-dense-twin"]
        main([*words, "--out", str(tmp_path / weight)])
        losses.append(_metrics(tmp_path / weight)["train_losses"])
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
        assert line.split()[1:4] == [
            "×".join(map(str, layer["shape"])),
            f"{layer['forward']:,}",
            f"{layer['backward']:,}",
        ]
    errors = _metrics(tmp_path)["test_mse"]
    assert all(f"{error:.4g}" in words for error in errors.values())
    assert "sparse: 100%" in progress
    assert "dense: 100%" in progress
    assert "validation and test differ by chance" in printed
    last = printed.splitlines()[-1]
    assert last == f"wrote loss.png, metrics.json, state.safetensors to {tmp_path}"


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
    assert metrics["train_losses"] == metrics["validation_losses"] == {"sparse": [None, None]}
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
        ("boston --lr -1", "lr must be in [0.0, inf), got -1.0"),
        ("boston --method adam", "invalid choice: 'adam'"),
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


@pytest.mark.usefixtures("_eager")
def test_method_rate_and_eager_mode_reach_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    real = demo.train

    def noting(*arguments: Any, **options: Any) -> demo.Run:
        seen.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr("topkast_func.__main__.train", noting)
    words = "boston --epochs 1 --method set --lr 0.002 --no-compile --no-dense-twin"
    main([*words.split(), "--out", str(tmp_path)])
    run = real("boston", replace(CONFIG, method=tk.set()), 1, 42, "again", lr=2e-3)
    assert _metrics(tmp_path)["train_losses"]["sparse"] == run.train_losses
    assert [(options["compile"], options["lr"]) for options in seen] == [(False, 2e-3)]


@pytest.mark.usefixtures("_eager")
def test_a_second_run_asks_for_another_folder_or_to_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["boston", "--epochs", "1", "--no-dense-twin", "--out", str(tmp_path)]
    main(words)
    before = (tmp_path / "metrics.json").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--seed", "1"])
    message = f"{tmp_path} holds an earlier run: name another folder by --out, or --overwrite it"
    assert message in capsys.readouterr().err
    assert (tmp_path / "metrics.json").read_bytes() == before
    main([*words, "--seed", "1", "--overwrite"])
    assert _metrics(tmp_path)["options"]["seed"] == 1


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("after", ["_error", "summary", "save"])
def test_what_comes_of_a_training_is_not_interrupted(
    after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a second Ctrl-C while the errors are measured, nor by any while it is told and written."""
    module = demo if after == "_error" else main_module
    real, loop, handler = getattr(module, after), tk.train, signal.getsignal(signal.SIGINT)

    def again(*arguments: Any, **options: Any) -> Any:
        if after != "_error" or ended:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    def cut_short(step: Any, state: Any, data: Any, *others: Any) -> Any:
        def batches() -> Any:
            yield from itertools.islice(data, 12)
            ended.append(True)
            signal.raise_signal(signal.SIGINT)

        return loop(step, state, batches() if after == "_error" else data, *others)

    ended: list[bool] = []
    monkeypatch.setattr(module, after, again)
    monkeypatch.setattr(demo, "loop", cut_short)
    words = ["boston", "--epochs", "4", "--no-dense-twin", "--out", str(tmp_path)]
    ends: Any = pytest.raises(SystemExit, match="130") if after == "_error" else nullcontext()
    with ends:
        main(words)
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES
    assert _metrics(tmp_path)["interrupted"] == {"sparse": after == "_error"}
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("when", ["step", "twin", "start"])
def test_ctrl_c_leaves_what_there_was_and_says_where(
    when: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third epoch, while the twin begins, and before anything."""
    starts = itertools.count()
    network, loop = demo._network, tk.train

    def begin(features: int, seed: int) -> Any:
        if next(starts) == {"step": 9, "twin": 1, "start": 0}[when]:
            raise KeyboardInterrupt
        return network(features, seed)

    def cut_short(step: Any, state: Any, data: Any, *others: Any) -> Any:
        def batches() -> Any:
            yield from itertools.islice(data, 12)
            raise KeyboardInterrupt

        return loop(step, state, batches() if when == "step" else data, *others)

    monkeypatch.setattr(demo, "_network", begin)
    monkeypatch.setattr(demo, "loop", cut_short)
    with pytest.raises(SystemExit) as exit_:
        main(["boston", "--epochs", "4", "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert exit_.value.code == 130
    epochs = {"step": "sparse 2", "twin": "sparse 4", "start": "none"}[when]
    assert err.splitlines()[-1] == f"interrupted; of 4 epochs: {epochs}"
    left = [] if when == "start" else FILES
    assert sorted(file.name for file in tmp_path.iterdir()) == left
    assert out.splitlines()[-1] == f"wrote {', '.join(left) or 'nothing'} to {tmp_path}"
    if left:
        metrics = _metrics(tmp_path)
        assert metrics["interrupted"] == {"sparse": when == "step"}
        assert len(metrics["validation_losses"]["sparse"]) == int(epochs[-1])
        assert tk.load(tmp_path / "state.safetensors").step > 0


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"topkast_func {tk.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", tk.__version__)
    changes = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    assert f"## {tk.__version__}\n" in changes


def test_help_names_the_jobs_the_options_and_their_defaults() -> None:
    command = [sys.executable, "-W", "error", "-m", "topkast_func", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "{boston,synthetic}" in done.stdout
    for option in (
        "--seed",
        "--epochs",
        "--no-dense-twin",
        "--forward-sparsity",
        "--out",
        "--method",
        "--lr",
        "--no-compile",
        "--version",
        "--overwrite",
    ):
        assert option in done.stdout
    assert "(default: 200)" in done.stdout


def test_boston_at_default_settings_reaches_a_test_error_of_at_most_8(tmp_path: Path) -> None:
    """Compiled, as every run of the command line is; the twin would change no number here."""
    main(["boston", "--no-dense-twin", "--out", str(tmp_path)])
    metrics = _metrics(tmp_path)
    assert metrics["test_mse"]["sparse"] <= 8.0
    assert metrics["test_mse"]["mean"] > 80.0
    assert len(metrics["train_losses"]["sparse"]) == 200
    assert all(map(math.isfinite, metrics["validation_losses"]["sparse"]))
    assert metrics["seconds"]["sparse"]["compilation"] > 0.0
