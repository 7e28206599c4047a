"""Which engine computes a layer, and what is said of one that cannot."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.kernels.problems import ON_CPU, check_products, integers, problem
from topkast_func.kernels import Layer, choose, engine, engines, sparse_linear
from topkast_func.kernels.costs import cost

LAYER = Layer(512, 1024, 52429, 104858, (1, 1), 128, torch.float32, "cpu")


@pytest.mark.parametrize("name", ON_CPU)
def test_every_engine_is_installed_here_and_chosen_by_name(name: Any) -> None:
    assert choose(name, LAYER) == (name, "asked for")
    assert all(callable(part) for part in engine(name))


def test_auto_chooses_the_least_cost_and_says_what_each_is() -> None:
    sparse = LAYER
    full = LAYER._replace(forward=512 * 1024, backward=512 * 1024, batch=8192)
    assert choose("auto", sparse).engine == "numba"
    assert choose("auto", full).engine == "dense"
    for layer in (sparse, full):
        found = choose("auto", layer)
        assert found.engine == min(("numba", "dense"), key=lambda name: cost(name, layer))
        assert "numba" in found.reason
        assert "dense" in found.reason


def test_the_cost_grows_with_the_work() -> None:
    for name in ("numba", "dense"):
        assert cost(name, LAYER._replace(batch=512)) > cost(name, LAYER)
        assert cost(name, LAYER._replace(backward=400_000)) > cost(name, LAYER)
    assert cost("numba", LAYER._replace(block_shape=(4, 4))) < cost("numba", LAYER)


def test_auto_takes_dense_for_what_no_kernel_computes() -> None:
    found = choose("auto", LAYER._replace(dtype=torch.float16))
    assert found.engine == "dense"
    assert found.reason.endswith("not float16")
    half = problem(dtype=torch.float16, grid=(4, 4))
    x = integers(2, 4, dtype=torch.float16)
    y = sparse_linear(x, half.values, half.pattern, half.shape)
    assert torch.equal(y.double(), x.double() @ half.alpha.double().T)


def test_auto_takes_dense_where_no_kernel_runs() -> None:
    assert choose("auto", LAYER._replace(device="cuda")).engine == "dense"
    assert choose("auto", LAYER._replace(device="mps")).engine == "dense"


@pytest.mark.parametrize("multiplies", [True, False])
def test_auto_knows_what_a_dense_product_in_bfloat16_costs_this_processor(
    multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    entries = 2048**2
    layer = Layer(2048, 2048, entries // 2, entries, (1, 1), 4096, torch.bfloat16, "cpu")
    assert choose("auto", layer).engine == ("dense" if multiplies else "numba")
    sparse = layer._replace(forward=entries // 10, backward=entries // 5)
    assert choose("auto", sparse).engine == "numba"


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [("numba", "float32, float64, bfloat16"), ("torch_sparse", "float32, float64")],
)
def test_an_engine_asked_for_by_name_tells_the_dtypes_it_has(name: Any, dtypes: str) -> None:
    message = f"engine {name} takes {dtypes}, not float16"
    with pytest.raises(TypeError, match=message):
        choose(name, LAYER._replace(dtype=torch.float16))
    half = problem(dtype=torch.float16)
    x = integers(2, 60, dtype=torch.float16)
    with pytest.raises(TypeError, match=message):
        sparse_linear(x, half.values, half.pattern, half.shape, engine=name)


@pytest.mark.parametrize(("name", "devices"), [("numba", "cpu"), ("torch_sparse", "cpu and cuda")])
def test_an_engine_asked_for_by_name_tells_the_devices_it_has(name: Any, devices: str) -> None:
    with pytest.raises(TypeError, match=f"engine {name} runs on {devices}, not on mps"):
        choose(name, LAYER._replace(device="mps"))


ON_GPU = Layer(4096, 4096, 2**24 // 10, 2**24 // 5, (64, 64), 8192, torch.bfloat16, device="cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    return monkeypatch


@pytest.mark.usefixtures("gpu")
def test_auto_chooses_between_triton_and_dense_on_a_gpu() -> None:
    for layer, expected in (
        (ON_GPU, "triton"),
        (ON_GPU._replace(dtype=torch.float32), "triton"),
        (ON_GPU._replace(forward=2**24, backward=2**24), "dense"),
    ):
        found = choose("auto", layer)
        assert found.engine == expected
        assert "triton" in found.reason
        assert "dense" in found.reason
        assert "projected" in found.reason
    assert cost("triton", ON_GPU._replace(block_shape=(16, 16))) > cost("triton", ON_GPU)
    assert cost("dense", ON_GPU._replace(batch=64)) < cost("dense", ON_GPU)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("block", [(1, 1), (8, 16), (16, 24)])
def test_blocks_that_triton_cannot_take_go_dense_or_are_named(block: tuple[int, int]) -> None:
    layer = ON_GPU._replace(block_shape=block)
    found = choose("auto", layer)
    assert found.engine == "dense"
    assert f"multiples of 16, not {block}: choose such blocks by block_shape" in found.reason
    with pytest.raises(TypeError, match="multiples of 16"):
        choose("triton", layer)


def test_an_old_gpu_is_named(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.raises(TypeError, match=r"capability 8.0 for torch.bfloat16, this one has 7.5"):
        choose("triton", ON_GPU)
    assert choose("auto", ON_GPU).engine == "dense"
    half = ON_GPU._replace(dtype=torch.float16)
    assert choose("triton", half).engine == "triton"  # without tensor cores
    found = choose("auto", half)
    assert found.engine == "dense"
    assert "capability 8.0 for torch.float16, this one has 7.5" in found.reason
    with pytest.raises(TypeError, match=r"takes float32, .*, not float64"):
        choose("triton", ON_GPU._replace(dtype=torch.float64))


def test_the_gpu_of_the_layer_is_asked(gpu: pytest.MonkeyPatch) -> None:
    ages = {None: (9, 0), 0: (9, 0), 1: (7, 5)}
    gpu.setattr(torch.cuda, "get_device_capability", lambda index: ages[index])
    chosen = [choose("auto", ON_GPU._replace(device_index=index)).engine for index in ages]
    assert chosen == ["triton", "triton", "dense"]


def test_numba_refuses_what_is_on_a_gpu() -> None:
    with pytest.raises(TypeError, match="engine numba runs on cpu, not on cuda"):
        choose("numba", LAYER._replace(device="cuda"))


@pytest.mark.parametrize("name", ["cuda", "", "Numba", None, "engines"])
def test_an_unknown_engine_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=r"engine must be 'auto' or one of .*'numba'.* got "):
        choose(name, LAYER)


# Packages that are not installed.


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forget what was imported, before the test and after."""
    engines.engine.cache_clear()
    engines.installed.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    engines.engine.cache_clear()
    engines.installed.cache_clear()


def without(monkeypatch: pytest.MonkeyPatch, package: str, *modules: str) -> None:
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    for module in modules:
        monkeypatch.delitem(sys.modules, f"topkast_func.kernels.{module}", raising=False)


@pytest.mark.usefixtures("gpu")
def test_without_triton_auto_goes_dense(missing: pytest.MonkeyPatch) -> None:
    without(missing, "triton", "triton_gpu")
    found = choose("auto", ON_GPU)
    assert found == (
        "dense",
        "all of α: triton is not installed (pip install 'topkast_func[triton]')",
    )


def test_without_numba_auto_goes_on(missing: pytest.MonkeyPatch) -> None:
    without(missing, "llvmlite", "numba_cpu", "llvm")
    found = choose("auto", LAYER)
    assert found == ("dense", "all of α: numba is not installed (pip install llvmlite)")
    given = problem()
    x = integers(3, 60)
    y = sparse_linear(x, given.values, given.pattern, given.shape)
    assert torch.equal(y, x @ given.alpha.T)


@pytest.mark.parametrize(
    ("name", "package", "modules", "line"),
    [
        ("numba", "llvmlite", ["numba_cpu", "llvm"], "pip install llvmlite"),
        ("triton", "triton", ["triton_gpu"], r"pip install 'topkast_func\[triton\]'"),
        (
            "torch_sparse",
            "torch_sparse",
            ["torch_sparse"],
            r"--no-build-isolation 'topkast_func\[torch-sparse\]'",
        ),
    ],
)
def test_an_engine_that_is_not_installed_says_how_to_get_it(
    name: Any, package: str, modules: list[str], line: str, missing: pytest.MonkeyPatch
) -> None:
    without(missing, package, *modules)
    with pytest.raises(ImportError, match=f"engine '{name}' cannot be used .*{line}"):
        choose(name, LAYER)
    given = problem()
    with pytest.raises(ImportError, match=line):
        sparse_linear(integers(3, 60), given.values, given.pattern, given.shape, engine=name)


def test_engines_are_found_again_after_that() -> None:
    for name in ON_CPU:
        check_products(name, problem(), 2)
