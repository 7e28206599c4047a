"""Settings that every test runs under."""

import gc
import os
import sys
from collections.abc import Iterator

import matplotlib
import pytest
import torch
from hypothesis import settings

matplotlib.use("Agg")
SLOW = (
    "tests/distributed/",
    "tests/integrations/",
    "tests/facade/test_many_processes.py",
    "tests/kernels/test_convolution.py::test_training",
    "tests/kernels/test_numba_cpu.py",
    "tests/kernels/test_triton.py::test_the_kernels",
    "tests/test_benchmarks.py",
    "tests/test_checkpoint.py::test_a_process_killed",
    "tests/test_damage.py",
    "tests/test_evidence.py::test_a_r",
    "tests/test_forward.py::test_forward_mode",
    "tests/test_forward.py::test_indexed_sets",
    "tests/test_gpu_benchmark.py",
    "tests/test_hosts.py",
    "tests/test_main.py::test_boston_at_default",
    "tests/test_materialize.py",
    "tests/test_methods.py::test_more_stages",
    "tests/test_notebooks.py",
    "tests/test_optim.py::test_a_run_in_float16",
    "tests/test_purity.py",
    "tests/test_readme.py::test_block",
    "tests/test_readme.py::test_two",
    "tests/test_trial.py",
    "tests/test_turns.py",
)
"""Beginnings of the tests that `make check` leaves out: several seconds each, or many."""

COMPILES = "compil"
"""What the names of tests say that compile: a second each at the least, left out too."""

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # threads of several workers on the same cores would wait for each other
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # of their processes

settings.register_profile("tests", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(SLOW) or COMPILES in item.nodeid:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    _leave_what_is_there()


@pytest.fixture(scope="module", autouse=True)
def _what_a_module_leaves() -> Iterator[None]:
    yield
    _leave_what_is_there()


def _leave_what_is_there() -> None:
    """Let no later collection of garbage look at it: the compiler's modules are many objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_figures() -> Iterator[None]:
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture
def small_layers_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of any size are stored sparsely for inference, as small ones else are not."""
    monkeypatch.setattr("topkast_func.inference.stored.pays", lambda *_: True)
