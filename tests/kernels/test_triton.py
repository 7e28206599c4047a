"""The engine "triton": its kernels in a process of their own, and how they are tuned.

Triton's interpreter is there or not from the start of a process.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tests.kernels.problems import integers, problem
from topkast_func.kernels import triton_gpu

HERE = Path(__file__).parent


def test_the_kernels_by_the_interpreter() -> None:
    """Run `interpreted`, whose outcome is the text of a failure here."""
    run = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*run, str(HERE / "interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


class Driver:
    """A driver of a GPU that is none, on which eight warps are the fastest."""

    def __init__(self) -> None:
        self.warps: list[int] = []

    def run(self, *_: Any, num_warps: int, **__: Any) -> None:
        self.warps.append(num_warps)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_benchmarker(self) -> Any:
        return lambda call, quantiles: [call() or -self.warps[-1]] * len(quantiles)


def test_what_is_fastest_is_kept_for_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    given = problem((16, 16), torch.float16, grid=(3, 4))
    g, x = (integers(5, n, dtype=torch.float16) for n in given.shape)
    for expected in ([4, 4, 4, 8, 8], [8]):  # each is timed once
        monkeypatch.setattr(driver, "_active", gpu := Driver())
        for name in ("_rows", "_dots"):
            kernel = getattr(triton_gpu, name)
            monkeypatch.setattr(kernel.fn, "run", gpu.run)
            again = triton_gpu._tuned(kernel.keys, kernel.configs)(kernel.fn)
            monkeypatch.setattr(triton_gpu, name, again)
        triton_gpu.forward(given.values, x, given.pattern, given.shape[0])
        assert sorted(gpu.warps) == expected
        gpu.warps.clear()
        triton_gpu.weight_gradient(g, x, given.pattern, given.values)
        assert sorted(gpu.warps) == sorted([*expected, 8])  # of A, and of B∖A
