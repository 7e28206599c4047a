"""Who compiles says so, once, and for how long; those who configure logging decide whether."""

import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import topkast_func as tk
from topkast_func import compiling
from topkast_func.kernels.llvm import Kernel


@pytest.fixture
def _no_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that never heard of logging."""
    monkeypatch.setattr(compiling.LOGGER, "hasHandlers", lambda: False)


def set_clock(monkeypatch: pytest.MonkeyPatch, *readings: float) -> None:
    clock = iter(readings)
    monkeypatch.setattr(compiling, "time", SimpleNamespace(perf_counter=lambda: next(clock)))


def two_in_one() -> None:
    with compiling.one_report():
        for _ in range(2):
            compiling.begin()
            compiling.begin("within")
            compiling.end()
            compiling.end()


def test_a_step_tells_of_each_compilation_once(caplog: pytest.LogCaptureFixture) -> None:
    model, config, optimizer = nn.Linear(6, 4), tk.TopKastConfig(), tk.sgd(0.1)
    options = {"backend": "aot_eager"}
    step = tk.make_train_step(
        model, lambda apply, x: apply(x).square().mean(), config, optimizer, compile=options
    )
    state, before = tk.init_state(model, config, optimizer), tk.compilation_seconds()
    told, seconds = [], []
    with caplog.at_level(logging.INFO, "topkast_func"):
        for rows in (5, 5, 3):
            state, _ = step(state, torch.ones(rows, 6))
            told.append([record.message for record in caplog.records])
            seconds.append(tk.compilation_seconds() - before)
            caplog.clear()
    assert [len(messages) for messages in told] == [2, 0, 2]
    assert told[0] == [compiling.BEGUN, compiling.ENDED.format(seconds[0])]
    assert 0 < seconds[0] == seconds[1] < seconds[2]


@pytest.mark.usefixtures("_no_logging")
def test_what_compiles_within_counts_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, 10.0, 12.0, 20.0, 21.5)
    before = tk.compilation_seconds()
    two_in_one()
    assert tk.compilation_seconds() - before == pytest.approx(3.5)
    assert capsys.readouterr().err == f"{compiling.BEGUN}\n{compiling.ENDED.format(3.5)}\n"


@pytest.mark.usefixtures("_no_logging")
def test_what_takes_a_moment_counts_and_is_not_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, 1.0, 3.0, 10.0, 12.0)
    before = tk.compilation_seconds()
    with compiling.untold():
        pass
    assert capsys.readouterr().err == ""
    with compiling.untold():
        two_in_one()
    assert tk.compilation_seconds() - before == pytest.approx(4.0)
    assert capsys.readouterr().err == f"{compiling.BEGUN}\n{compiling.ENDED.format(2.0)}\n"


def test_the_machine_code_of_a_kernel_counts_as_compilation() -> None:
    kernel, before = Kernel(lambda tile, part, parts: None, torch.float32), tk.compilation_seconds()
    kernel(parts=1)
    once = tk.compilation_seconds() - before
    kernel(parts=1)
    assert 0 < once == tk.compilation_seconds() - before


@pytest.mark.usefixtures("_no_logging")
@pytest.mark.parametrize(
    "silence",
    [
        lambda patch: patch.setattr(compiling.LOGGER, "hasHandlers", lambda: True),
        lambda patch: patch.setattr(compiling.LOGGER, "level", logging.WARNING),
        lambda patch: patch.setattr(logging.root.manager, "disable", logging.INFO),
    ],
    ids=["handlers", "level", "disable"],
)
def test_logging_that_is_configured_decides(
    silence: Callable[[pytest.MonkeyPatch], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silence(monkeypatch)
    two_in_one()
    assert capsys.readouterr().err == ""
