"""The products on the CPU: exact on small integers, whatever threads and forks do."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import get_context
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.kernels.drawn import problems
from tests.kernels.problems import (
    BATCHES,
    BLOCKS,
    DTYPES,
    Problem,
    check_products,
    integers,
    problem,
    products,
)
from topkast_func.kernels import llvm, numba_cpu, sparse_linear, threads
from topkast_func.kernels.llvm import Kernel


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """Run in parallel, on machines of one core too, and give the threads back."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("block", "dtype"),
    [
        *((block, torch.float32) for block in BLOCKS),
        *((block, torch.bfloat16) for block in BLOCKS),
        *((block, torch.float64) for block in ((1, 1), (4, 1), (4, 4), (3, 5))),
    ],
)
@pytest.mark.parametrize("batch", [0, 5, 300])
def test_products_are_exact(block: tuple[int, int], dtype: torch.dtype, batch: int) -> None:
    check_products("numba", problem(block, dtype), batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [*BATCHES, 16, 17, 129, 256])
def test_products_of_any_batch(batch: int, dtype: torch.dtype) -> None:
    check_products("numba", problem((4, 1), dtype), batch)


@given(problems([(1, 1), (4, 1), (1, 4)]), st.integers(0, 20))
def test_products_of_any_sets(given: Problem, batch: int) -> None:
    check_products("numba", given, batch)


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
@pytest.mark.parametrize("density", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_matrices_of_several_panels(
    block: tuple[int, int], density: float, dtype: torch.dtype
) -> None:
    grid = (12 // block[0], 2400 // block[1])
    wide = problem(block, dtype, grid, (density / 2, density))
    assert wide.pattern.forward.pointers.shape[0] > wide.shape[0] // block[0] + 1
    check_products("numba", wide, 3)
    tall = problem(block, dtype, grid[::-1], (density / 2, density))
    assert tall.pattern.transposed.pointers.shape[0] > tall.shape[1] // block[1] + 1
    check_products("numba", tall, 3)


def test_values_of_any_strides() -> None:
    given = problem((4, 4))
    strided = torch.stack([given.values, -given.values], -1)[..., 0]
    assert not strided.is_contiguous()
    x = integers(5, given.shape[1])
    y = sparse_linear(x, strided, given.pattern, given.shape, engine="numba")
    assert torch.equal(y, x @ given.alpha.T)


def test_what_has_no_memory_any_more_is_refused() -> None:
    kernel, tensor = Kernel(lambda tile, part, parts, where: None, torch.float32), torch.ones(64)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory: it was freed"):
        kernel(tensor)


# Threads: as many as torch has, one parallel product at a time, the same result with any number.


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    given = problem(grid=(64, 512))
    given = given._replace(theta=torch.randn(64, 512))
    x, g = torch.randn(300, 512), torch.randn(300, 64)
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(products("numba", given, x, g))
    for one, *others in zip(*found, strict=True):
        assert one.any()
        assert all(torch.equal(one, other) for other in others)


def test_threads_of_python_serve_where_torch_has_no_gnu_openmp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = problem(grid=(200, 300))
    x, g = integers(300, 300), integers(300, 200)
    expected, names = products("numba", given, x, g), set[str]()

    def by_pool(part: Any, *others: Any) -> None:
        def watched(data: Any) -> None:
            names.add(threading.current_thread().name)
            part(data)

        pooled(watched, *others)

    pooled = threads._by_pool
    monkeypatch.setattr(threads, "SHARED", None)
    monkeypatch.setattr(threads, "_by_pool", by_pool)
    found = products("numba", given, x, g)
    assert all(map(torch.equal, found, expected))
    assert {name.split("_0")[0] for name in names} == {"MainThread", "topkast_func"}


@pytest.mark.parametrize(("batch", "asked"), [(1, False), (300, True)])
def test_no_thread_is_asked_for_a_little_work(
    batch: int, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem(grid=(40, 60))
    x, g = integers(batch, 60), integers(batch, 40)
    expected = products("numba", given, x, g)
    monkeypatch.setattr(llvm, "LITTLE", 2**16)
    waiting = Mock(wraps=threads._WAITING)
    monkeypatch.setattr(threads, "_WAITING", waiting)
    found = products("numba", given, x, g)
    assert all(map(torch.equal, found, expected))
    assert waiting.look.called is asked


def test_products_from_several_python_threads_at_once() -> None:
    given = problem(grid=(200, 300))
    x = integers(300, 300)
    expected = x @ given.alpha.T
    right: list[bool] = []
    gate = threading.Barrier(4)

    def work() -> None:
        gate.wait()
        for _ in range(50):
            y = sparse_linear(x, given.values, given.pattern, given.shape, engine="numba")
            right.append(torch.equal(y, expected))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [True] * 200


# Forks.


Found = tuple[Tensor, Tensor, Tensor]


def _right(found: Found, expected: Found) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def _child(given: Problem, x: Tensor, g: Tensor, expected: Found, pipe: Any) -> None:
    """Run kernels alone: torch's own parallel products may hang after a fork."""
    pipe.send(_right(products("numba", given, x, g), expected))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_computes_after_its_parent_did(threads: int) -> None:
    given = problem()
    x, g = integers(32, 60), integers(32, 40)
    expected = products("numba", given, x, g)
    torch.set_num_threads(threads)
    context = get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_child, args=(given, x, g, expected, there), daemon=True)
    child.start()
    there.close()
    try:
        assert here.poll(30), "the child hangs"
        assert here.recv() is True
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert _right(products("numba", given, x, g), expected)


class Products(Dataset[Tensor]):
    """Items that are sparse products."""

    def __init__(self, given: Problem, x: Tensor) -> None:
        self.given, self.x = given, x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> Tensor:
        torch.set_num_threads(2)
        given = self.given
        x = self.x[row]
        return sparse_linear(x, given.values, given.pattern, given.shape, engine="numba")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_data_loader_worker_computes_after_its_parent_did() -> None:
    given, x = problem(), integers(12, 60)
    expected = x @ given.alpha.T
    assert torch.equal(
        sparse_linear(x, given.values, given.pattern, given.shape, engine="numba"), expected
    )
    loader = DataLoader(
        Products(given, x), batch_size=4, num_workers=1, multiprocessing_context="fork", timeout=30
    )
    assert torch.equal(torch.cat(list(loader)), expected)


# The width of vectors.

PROGRAM = """
import torch
from topkast_func.kernels import pattern_of, sparse_linear
from topkast_func.kernels.tiles import VECTOR_BYTES
mask = torch.eye(8, dtype=torch.bool)
x = torch.arange(1.0, 9.0).repeat(3, 1)
y = sparse_linear(x, torch.ones(8), pattern_of(mask, mask), (8, 8), engine="numba")
print(VECTOR_BYTES, torch.equal(y, x))
"""


def test_products_in_vectors_of_any_processor() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["32", "True"]


@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(1, 40))
def test_a_full_matrix_is_the_dense_product(rows: int, columns: int) -> None:
    full = problem(grid=(rows, columns), densities=(2.0, 2.0))
    assert bool(full.forward.all())
    check_products("numba", full, 3)


def test_kernels_are_made_while_their_layer_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    prepare = numba_cpu.prepare
    monkeypatch.setattr(numba_cpu, "prepare", lambda *layer: threads.append(prepare(*layer)))
    block = (3, 7)  # of no other test
    given = problem(block, torch.float64)
    x = integers(4, given.shape[1]).double()
    traced = torch.compile(sparse_linear, backend="eager", fullgraph=True)
    y = traced(x, given.values, given.pattern, given.shape, engine="numba")
    for thread in threads:
        thread.join()
    assert torch.equal(y, x @ given.alpha.T)
    kernels = (
        numba_cpu._rows_kernel(block[::-1], True, torch.float64),  # of the backward pass alone
        numba_cpu._dots_kernel(block, torch.float64),
    )
    assert threads
    assert all(kernel._part for kernel in kernels)
