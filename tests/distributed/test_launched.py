"""The demo by the processes that torchrun started."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.processes import results
from topkast_func import __main__ as command
from topkast_func.distributed.launched import is_first, launched, own_rows, world


def _demo(rank: int, out: Path) -> str:
    options = ["--epochs", "3", "--refresh-every", "2", "--no-dense-twin", "--no-compile", "--out"]
    command.main(["boston", *options, str(out)])
    return f"{is_first()}"


def test_two_processes_run_the_demo_as_one_does_and_one_of_them_writes(
    tmp_path: Path,
) -> None:
    assert results(_demo, tmp_path / "both") == ["True", "False"]
    _demo(0, tmp_path / "one")
    both, one = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("both", "one"))
    for key in ("train_losses", "validation_losses", "test_mse"):
        assert both[key]["sparse"] == pytest.approx(one[key]["sparse"], rel=1e-4)


def test_a_process_that_was_not_started_with_others_is_alone() -> None:
    with launched():
        assert world() is None
        assert is_first()
    x, y = own_rows([(torch.ones(3), torch.tensor(1.0)) for _ in range(5)])
    assert (x.shape, y.shape) == ((5, 3), (5,))
