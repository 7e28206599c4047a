"""Every notebook runs, at reduced size, and is committed with what it showed."""

import ast
import atexit
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from tests.eager import eager_step

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
REDUCED = {
    "02_train_step": "STEPS = 40",
    "03_boston_facade": "EPOCHS = 6",
    "04_your_model": "STEPS = 25",
    "06_ordinary_loop": "STEPS = 10",
    "07_recipes": "STEPS = 30",
    "08_many_processes": "STEPS = 10",
}
read = partial(nbformat.read, as_version=4)
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_eight() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{n:02}" for n in range(1, 9)]
    assert REDUCED.keys() <= {path.stem for path in NOTEBOOKS}


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    """Give what runs the cells of a notebook, within this process; steps are not compiled."""
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr("topkast_func.make_train_step", eager_step)
    options = Config({"HistoryManager": {"enabled": False}})
    shell = InteractiveShell(  # type: ignore[no-untyped-call]
        config=options, user_module=ModuleType("notebook")
    )
    atexit.unregister(shell.atexit_operations)  # empties what Dynamo still refers to
    yield shell
    monkeypatch.undo()


@by_name
def test_it_runs(path: Path, shell: InteractiveShell) -> None:
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    parameters = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == (path.stem in REDUCED)
    for cell in parameters:
        cell.source = REDUCED[path.stem]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for cell in cells:
            shell.run_cell(cell.source).raise_error()  # type: ignore[no-untyped-call]


@by_name
def test_it_is_committed_as_it_ran_from_top_to_bottom(path: Path) -> None:
    cells = [c for c in read(path).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@by_name
def test_it_imports_nothing_private(path: Path) -> None:
    for cell in read(path).cells:
        if cell.cell_type != "code":
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [alias.name for alias in node.names]
                module = getattr(node, "module", None) or ""
                parts = ".".join([module, *names]).split(".")
                assert not any(part.startswith("_") for part in parts), cell.source
