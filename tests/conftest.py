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
    "tests/facade/test_guard.py::test_a_layer_that_comes_out",
    "tests/facade/test_layers.py::test_what_is_written",
    "tests/facade/test_many_processes.py",
    "tests/facade/test_sparse_layer.py::test_forward_mode",
    "tests/facade/test_sparsify.py::test_gradients_that_a_loop",
    "tests/facade/test_trainer.py::test_the_seeds_example",
    "tests/integrations/",
    "tests/kernels/test_between.py::test_a_compiled",
    "tests/kernels/test_convolution.py::test_training",
    "tests/kernels/test_library.py::test_an_operator_has",
    "tests/kernels/test_numba_cpu.py",
    "tests/kernels/test_triton.py::test_the_kernels",
    "tests/test_benchmarks.py",
    "tests/test_checkpoint.py::test_a_process_killed",
    "tests/test_compact.py::test_one_graph",
    "tests/test_damage.py",
    "tests/test_device.py::test_on_the_device",
    "tests/test_evidence.py::test_a_r",
    "tests/test_forward.py::test_forward_mode",
    "tests/test_forward.py::test_indexed_sets",
    "tests/test_forward.py::test_the_gradient",
    "tests/test_forward.py::test_the_penalised_loss",
    "tests/test_gpu_benchmark.py",
    "tests/test_hosts.py",
    "tests/test_inference.py::test_values_and_bias",
    "tests/test_main.py::test_boston_at_default",
    "tests/test_master.py::test_two_hundred_steps",
    "tests/test_master.py::test_without_a_master",
    "tests/test_materialize.py",
    "tests/test_methods.py::test_more_stages",
    "tests/test_notebooks.py",
    "tests/test_optim.py::test_a_run_in_float16",
    "tests/test_plan.py::test_fsdp",
    "tests/test_purity.py",
    "tests/test_readme.py::test_block",
    "tests/test_readme.py::test_the_page",
    "tests/test_readme.py::test_two",
    "tests/test_repeats.py::test_numbers",
    "tests/test_training.py::test_dropout_and",
    "tests/test_training.py::test_the_update",
    "tests/test_training.py::test_too_many",
    "tests/test_trial.py",
    "tests/test_turns.py",
    "tests/test_whole.py::test_what_is_whole",
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
