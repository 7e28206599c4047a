"""Settings that every test runs under."""

import os
from collections.abc import Iterator

import matplotlib
import pytest
import torch
from hypothesis import settings

matplotlib.use("Agg")
SLOW = (
    "tests/distributed/",
    "tests/integrations/",
    "tests/kernels/test_numba_cpu.py",
    "tests/kernels/test_triton.py::test_the_kernels",
    "tests/test_benchmarks.py",
    "tests/test_checkpoint.py::test_a_process_killed",
    "tests/test_compact.py::test_dynamic_shapes",
    "tests/test_compilation.py",
    "tests/test_damage.py",
    "tests/test_evidence.py::test_a_r",
    "tests/test_main.py::test_boston_at_default",
    "tests/test_methods.py::test_more_stages",
    "tests/test_models.py::test_compiled",
    "tests/test_notebooks.py",
    "tests/test_optim.py::test_a_run_in_float16",
    "tests/test_optim_parts.py::test_compiled",
    "tests/test_readme.py::test_block",
)
"""Beginnings of the tests that `make check` leaves out: several seconds each, or many."""

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # threads of several workers on the same cores would wait for each other
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # of their processes

settings.register_profile("tests", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_figures() -> Iterator[None]:
    yield
    from matplotlib import pyplot

    pyplot.close("all")


@pytest.fixture
def small_layers_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of any size are stored sparsely for inference, as small ones else are not."""
    monkeypatch.setattr("topkast_func.inference.stored.pays", lambda *_: True)
