"""The benchmark of a GPU, as far as it goes without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import gpu
from tests import on_device
from tests.kernels import problems
from topkast_func.kernels import engines

FEW = """
import sys
for name in "matplotlib rich psutil pytest hypothesis scipy torch_sparse sparselab".split():
    sys.modules[name] = None
"""
"""As if there were torch, NumPy, Numba, safetensors and tqdm alone; triton is for a GPU."""


def run(program: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", FEW + program], capture_output=True, text=True, check=False
    )


@pytest.fixture(autouse=True)
def _without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do as if what is asked of CUDA were done."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**20)


def test_a_wrong_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = engines.engine("dense")
    wrong = right._replace(weight_gradient=lambda *given: 2 * right.weight_gradient(*given))
    known = {"dense": wrong, "reference": engines.engine("reference")}
    monkeypatch.setattr(problems, "engine", known.get)
    with pytest.raises(AssertionError, match="not equal"):
        on_device.check_products(torch.device("cpu"), torch.float32, 16, 5)


def test_another_number_or_set_is_found() -> None:
    ones = torch.ones(3)
    for expected in (ones + 1e-6, ones.double(), ones > 0, torch.tensor([1.0, 1.0, torch.nan])):
        with pytest.raises(AssertionError):
            on_device.same((ones,), (expected,))


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "NETWORKS", {"gpt": (lambda: nn.Linear(64, 64), (4, 64))})
    monkeypatch.setattr(gpu, "LAYERS", ((64, 20),))
    monkeypatch.setattr(gpu, "milliseconds", lambda call: float(call() is not None))
    cases = dict(gpu.measurements("cpu"))
    assert len(cases) == 8
    first = [name.split()[0] for name in cases][:6]
    assert first == [*["layer"] * 4, "step", "step"]
    found = cases["layer 64 20 16"]()
    assert found["ms"].keys() == {"dense", "masked", "blocks 0.8", "blocks 0.9", "blocks 0.95"}
    assert found["times_as_fast_as_dense"]["blocks 0.9"] == 1.0
    monkeypatch.setattr("topkast_func.make_train_step", lambda *_: lambda state, batch: state)
    assert cases["step gpt 32"]() == {"ms": 1.0, "peak_mib": 1.0}


def test_a_run_keeps_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(on_device, "checks", lambda _: [("a", fail)])
    monkeypatch.setattr(on_device, "compiled_checks", lambda _: [("b", lambda: None)])
    monkeypatch.setattr(gpu, "measurements", lambda _: [("c", lambda: {"ms": 1.0})])
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "gpu.json")])
    gpu.main()
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["device"] == "some GPU"
    assert kept["entries"][0].pop("where")[-1].startswith("fail, line ")
    told = [{k: v for k, v in entry.items() if k != "seconds"} for entry in kept["entries"]]
    failed = {"name": "a", "error": "RuntimeError: no kernel"}
    assert told == [failed, {"name": "b", "right": True}, {"name": "c", "ms": 1.0}]


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "there is no GPU that torch can use" in capsys.readouterr().err


def test_it_runs_with_few_packages() -> None:
    program = """
import torch
from benchmarks import gpu
import topkast_func as tk
from tests import on_device
for name, check in on_device.checks(torch.device("cpu")):
    if not name.startswith(("training", "optimizer")):
        check()
model, config, optimizer = torch.nn.Linear(8, 8), tk.TopKastConfig(), tk.adamw()
state = tk.init_state(model, config, optimizer)
step = tk.make_train_step(model, on_device.energy, config, optimizer, compile=False)
print(int(step(state, torch.ones(2, 8))[0].step))
"""
    done = run(program)
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.parametrize("module", ["benchmarks", "benchmarks.gpu"])
def test_the_command_runs_with_few_packages(module: str) -> None:
    words = ["gpu"] if module == "benchmarks" else []
    program = f"""
import runpy
import torch
torch.cuda.is_available = lambda: False
sys.argv[1:] = {words}
runpy.run_module({module!r}, run_name="__main__")
"""
    done = run(program)
    assert done.returncode == 1
    assert "there is no GPU that torch can use" in done.stderr
