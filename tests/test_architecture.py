"""Imports point one way: each module may only use those above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import topkast_func

PACKAGES = [
    "types",
    "turns",
    "warn",
    "elsewhere",
    "compiling",
    "checks",
    "reading",
    "powerprop",
    "leaves",
    "trees",
    "devices",
    "sparsity",
    "tiebreak",
    "bits",
    "places",
    "groups",
    "block_masks",
    "kernels",
    "ranking",
    "filling",
    "methods",
    "config",
    "masks",
    "entry",
    "penalty",
    "model",
    "storage",
    "files",
    "distributed",
    "training",
    "report",
    "testing",
    "facade",
    "inference",
    "integrations",
    "data",
    "demo",
    "",
    "__main__",
]
"""Packages and single modules; each may only use those above it, and itself."""

ROOT = Path(topkast_func.__file__).parent


def package_of(path: Path) -> str:
    """Name the package, or the module beside the packages, that a file belongs to."""
    part = path.relative_to(ROOT).with_suffix("").parts[0]
    return "" if part == "__init__" else part


def imported(source: str) -> set[str]:
    """Name the packages that a source imports from, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            root, *inner = module.split(".")
            if root == "topkast_func":
                found.add(inner[0] if inner and inner[0] in PACKAGES else "")
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = package_of(path)
    allowed = set(PACKAGES[: PACKAGES.index(package)]) | {package}
    assert imported(path.read_text()) <= allowed


def test_an_import_that_points_back_is_seen() -> None:
    assert imported("from topkast_func.training.step import x") == {"training"}
    assert imported("def f():\n    from topkast_func import report") == {"report"}
    assert imported("import topkast_func.facade.layers") == {"facade"}
    assert imported("from topkast_func import TopKastConfig") == {""}


def test_only_the_state_knows_how_the_state_is_stored() -> None:
    users = {package_of(p) for p in ROOT.rglob("*.py") if "storage" in imported(p.read_text())}
    assert users - {"storage"} <= {"training", "facade"}


HOST = {
    "report",
    "methods",
    "facade",
    "training/step.py",
    "training/refresh.py",
    "training/gather.py",
}
"""What no graph holds; of the facade, `derived` is read while one is made."""


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_graph_replaces_fields_of_a_named_tuple(path: Path) -> None:
    """Dynamo in torch 2.11 returns an empty tuple for ``_replace``; see `types.changed`."""
    where = str(path.relative_to(ROOT))
    traced = where.startswith("facade/derived") or not {where, package_of(path)} & HOST
    names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    assert not (traced and "_replace" in names)


def test_importing_the_package_is_lean() -> None:
    heavy = (
        "matplotlib torch_sparse scipy rich llvmlite triton transformers lightning torch._dynamo "
        "torch.distributed.checkpoint"
    )
    program = f"import sys, topkast_func; print(*set({heavy.split()}) & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
