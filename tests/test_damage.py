"""Damaged files at random, a few of each kind; `python -m tests.damage 2000` is the long form."""

import json
import subprocess
import sys
from pathlib import Path

from tests import damage


def test_no_damaged_file_is_loaded_and_each_is_one_error() -> None:
    """In a process of its own, of which the address space is bounded: none asks for much."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.damage", "160"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {f"{kind.__name__}: refused" for kind in damage.KINDS}, done.stderr
    assert sum(found.values()) >= 160
