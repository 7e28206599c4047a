"""What the README shows runs, and its figures are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["functional", "masks", "facade", "engines"])
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_commands_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", README)) <= set(targets)


def test_pictures_exist() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_boston_figures_are_those_measured() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "boston.json").read_text())
    median = results["median_test_mse"]
    splits = results["split_test_mse"]
    for several in splits.values():
        assert f"{min(several):.1f} to {max(several):.1f}" in README
    for figure in (
        f"{median['sparse']:.3g}",
        f"{median['dense']:.3g}",
        f"{results['mean_mse']:.3g}",
    ):
        assert re.search(rf"\| {re.escape(figure)} \|", README)
