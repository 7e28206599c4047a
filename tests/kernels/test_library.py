"""Operators by name: graphs that torch keeps on disk call them so."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

import topkast_func

ASK = "import torch, topkast_func.model.alpha; print(*torch.ops.topkast_func.alpha.overloads())"


def test_an_operator_has_another_name_where_what_its_gradient_calls_is_another(
    tmp_path: Path,
) -> None:
    """The gradient of α calls an operator of the kernels, which a graph on disk names too."""
    package = tmp_path / "topkast_func"
    shutil.copytree(Path(topkast_func.__file__).parent, package)
    code, told = package / "kernels" / "pattern.py", []
    for change in ("", "# another\n"):
        code.write_text(code.read_text() + change)
        told.append(subprocess.check_output([sys.executable, "-c", ASK], cwd=tmp_path, text=True))
    assert told[0].split() == list(torch.ops.topkast_func.alpha.overloads())  # type: ignore[no-untyped-call]
    assert told[1] != told[0]
