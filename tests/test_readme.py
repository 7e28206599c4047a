"""What the README shows runs; its tables, and the page of results, are drawn from the JSON."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import page, record, views
from benchmarks.evidence import report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NAMES = ("functional", "ordinary", "processes", "methods")
BLOCKS = dict(zip(NAMES, re.findall(r"```python\n(.*?)```", README, re.DOTALL), strict=True))
LAUNCH = "torch.distributed.run --nproc-per-node 2 two.py"


def test_two_processes_start_as_it_says(tmp_path: Path) -> None:
    assert f"`python -m {LAUNCH}`" in README
    (tmp_path / "two.py").write_text(BLOCKS["processes"])
    subprocess.run([sys.executable, "-m", *LAUNCH.split()], cwd=tmp_path, check=True)
    assert (tmp_path / "run" / "latest").read_text() == "step-300"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "processes"])
def test_block_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[name], "README.md", "exec"), {})


def test_commands_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", README)) <= set(targets)


def test_pictures_exist() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


@pytest.fixture(scope="module")
def committed() -> tuple[record.Results, dict[str, report.Evidence]]:
    return record.load(), report.ready()


def test_the_tables_are_those_measured(
    committed: tuple[record.Results, dict[str, report.Evidence]],
) -> None:
    results, evidence = committed
    assert page.accuracy(evidence) in README
    assert views.steps(results) in README
    assert page.readme(README, *committed) == README


def test_a_readme_without_a_place_for_a_table_is_refused(
    committed: tuple[record.Results, dict[str, report.Evidence]],
) -> None:
    with pytest.raises(ValueError, match="must have <!-- steps --> and <!-- end --> once"):
        page.readme(README.replace("<!-- steps -->", ""), *committed)


def test_the_page_of_results_is_what_the_command_draws(
    committed: tuple[record.Results, dict[str, report.Evidence]],
) -> None:
    drawn = page.page(*committed)
    assert page.PAGE.read_text() == drawn
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", drawn)
    assert len(pictures) == 7
    assert all((record.HERE / picture).is_file() for picture in pictures)
