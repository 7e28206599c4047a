"""Imports point one way: each module may only use those above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import topkast_func

LAYERS = [
    "types",
    "checks",
    "sparsity",
    "kernels.pattern",
    "kernels.tiles",
    "kernels.simd",
    "kernels.threads",
    "kernels.selection",
    "kernels.numba_cpu",
    "kernels.reference",
    "kernels.dense",
    "kernels.torch_sparse",
    "kernels.engines",
    "kernels.linear",
    "kernels",
    "ranking",
    "methods.base",
    "methods.magnitude",
    "methods.exchange",
    "methods",
    "config",
    "allocation",
    "masks",
    "powerprop",
    "entry",
    "active",
    "layers",
    "modules",
    "forward",
    "loss",
    "optim",
    "dense_weights",
    "compact_weights",
    "state",
    "compilation",
    "purity",
    "training",
    "checkpoint",
    "explain",
    "summary",
    "flops",
    "exchange",
    "loop",
    "tensorboard",
    "export",
    "plots",
    "testing",
    "facade.linear",
    "facade.loss",
    "facade.trainer",
    "facade",
    "data.boston",
    "data.characters",
    "data.images",
    "data.synthetic",
    "data",
    "job",
    "",
    "__main__",
]
ROOT = Path(topkast_func.__file__).parent


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(source: str) -> set[str]:
    """Name the modules of the package that a source imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            inner = module.removeprefix("topkast_func").removeprefix(".")
            if module.startswith("topkast_func.") and inner in LAYERS:
                found.add(inner)
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    allowed = set(LAYERS[: LAYERS.index(name_of(path))])
    assert imported(path.read_text()) <= allowed


def test_an_import_that_points_back_is_seen() -> None:
    assert imported("from topkast_func.training import x") == {"training"}
    assert imported("def f():\n    from topkast_func import plots") == {"plots"}
    assert imported("import topkast_func.facade.linear") == {"facade.linear"}


def test_only_the_state_knows_how_the_state_is_stored() -> None:
    storages = {"dense_weights", "compact_weights"}
    users = {name_of(p) for p in ROOT.rglob("*.py") if storages & imported(p.read_text())}
    assert users == {"state", "checkpoint"}


def test_importing_the_package_is_lean() -> None:
    heavy = "matplotlib torch_sparse scipy rich numba"
    program = f"import sys, topkast_func; print(*set({heavy.split()}) & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
