"""What is kept of a run: entries, one on a line, and where and with what they were measured."""

import json
import math
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping
from datetime import date
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

HERE = Path(__file__).parent
RESULTS, FIGURES = HERE / "results", HERE / "figures"
USED = ("topkast_func", "torch", "numpy", "llvmlite", "torch_sparse", "torch_scatter", "sparselab")

Entry: TypeAlias = Mapping[str, Any]
"""One arm at one task of one case, as JSON holds it: ``suite``, ``case``, ``arm``, ``task``, the
``parameters`` of the arm, the ``unit`` of its numbers, ``repeats_s`` (or in another unit), one
number for each round, their ``median_s``, and ``error`` where there are none, or no more."""


def median(entry: Entry) -> float:
    """Return the median of the numbers; NaN without any."""
    return float(entry.get(f"median_{entry['unit']}", math.nan))


def spread(entry: Entry) -> float | None:
    """Return half the distance of the quartiles over the median; None of less than two numbers."""
    repeats = entry.get(f"repeats_{entry['unit']}", ())
    if len(repeats) < 2:
        return None
    low, middle, high = statistics.quantiles(repeats, n=4, method="inclusive")
    return float((high - low) / 2 / middle)


class Results(NamedTuple):
    """What was measured: the circumstances by suite, and all entries."""

    about: dict[str, dict[str, Any]]
    entries: list[Entry]

    def of(self, suite: str, case: str, task: str | None = None) -> list[Entry]:
        """Return the entries of a case, or of one task of it."""
        found = (e for e in self.entries if (e["suite"], e["case"]) == (suite, case))
        return [e for e in found if task in {None, e["task"]}]

    def cases(self, suite: str) -> list[str]:
        """Name the cases of a suite."""
        return list(dict.fromkeys(e["case"] for e in self.entries if e["suite"] == suite))

    def ratio(self, suite: str, case: str, task: str, over: Iterable[str], arm: str) -> float:
        """Return how many times an arm the best of ``over`` is; NaN without both."""
        numbers = {entry["arm"]: median(entry) for entry in self.of(suite, case, task)}
        best = np.fmin.reduce([numbers.get(name, math.nan) for name in over])
        return float(best / numbers.get(arm, math.nan))

    def where(self, suite: str) -> str:
        """Say on what and when a suite ran."""
        about = self.about[suite]
        cpu, torch = about["machine"]["cpu"], about["versions"]["torch"]
        return f"{cpu}, {about['threads']} threads, torch {torch}, {about['date']}"


def load(folder: Path = RESULTS) -> Results:
    """Read what the suites left in a folder."""
    kept = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    about = {suite: content for suite, content in kept.items() if "cases" in content}
    return Results(about, [entry for content in about.values() for entry in content.pop("cases")])


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with one line for every key, and for every entry of a list one of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for key, value in content.items():
        rows = ",\n".join(map(json.dumps, value)) if isinstance(value, list) else ""
        lines.append(f"{json.dumps(key)}: " + (f"[\n{rows}\n]" if rows else json.dumps(value)))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def circumstances(threads: int) -> dict[str, Any]:
    """Tell where, when and with what a run measures with so many threads per process."""
    machine = {name: value for name, value in torch.cpu.get_capabilities().items() if value}
    found = {d.name.replace("-", "_"): d.version for d in distributions()}
    git = partial(subprocess.run, capture_output=True, text=True, check=False, cwd=HERE)
    commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
    changed = git(["git", "status", "--porcelain", "-uno", "--", ":/topkast_func"]).stdout
    return {
        "date": date.today().isoformat(),
        "commit": f"{commit}, topkast_func modified" if changed else commit,
        "machine": {"system": platform.system(), "cpu": machine.pop("cpu_name", ""), **machine},
        "threads": threads,
        "versions": {"python": platform.python_version(), **{p: found.get(p) for p in USED}},
    }
