"""What is kept of a run: entries, and where and with what they were measured."""

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.protocol import Parameters, Plan

PACKAGES = (
    "topkast_func",
    "torch",
    "numpy",
    "numba",
    "llvmlite",
    "torch-sparse",
    "torch-scatter",
    "sparselab",
)
CPU_INFO, CPU_TIMES = Path("/proc/cpuinfo"), Path("/proc/stat")
WATCHED_S = 1.0
FOLDERS = re.compile(r"(?<!\w)/(?:[^\s/:'\"]+/)+")


@dataclass(frozen=True)
class Entry:
    """One arm at one task of one case.

    Attributes:
        suite: Name of the suite.
        case: Name of the case; ratios are taken within one.
        arm: Name of the arm.
        task: Name of the task; empty where the arm did not come to have any.
        parameters: Of the arm and the task.
        repeats: One number per round or process, in the order they were taken.
        unit: Their unit, "s" or "bytes".
        setup_s: Building and first call, seconds; compilation is in it.
        error: Why there are no (more) numbers.
    """

    suite: str
    case: str
    arm: str
    task: str = ""
    parameters: Parameters = field(default_factory=dict)
    repeats: tuple[float, ...] = ()
    unit: str = "s"
    setup_s: float | None = None
    error: str | None = None

    @property
    def median(self) -> float | None:
        """Median of the repeats; None without any."""
        return statistics.median(self.repeats) if self.repeats else None

    def as_json(self) -> dict[str, Any]:
        """Return the entry as JSON holds it, with the unit in the keys of its numbers."""
        kept = {key: value for key, value in asdict(self).items() if value is not None}
        if self.error is not None:
            kept["error"] = FOLDERS.sub("", self.error)  # folders are of one machine
        repeats = list(kept.pop("repeats"))
        if repeats:
            kept[f"median_{self.unit}"] = self.median
            kept[f"min_{self.unit}"] = min(repeats)
            kept[f"repeats_{self.unit}"] = repeats
        return kept


def entry_of(kept: Mapping[str, Any]) -> Entry:
    """Read an entry back.

    Args:
        kept: What `Entry.as_json` returned.

    Returns:
        The entry.
    """
    own = {key: kept[key] for key in kept if key in Entry.__dataclass_fields__}
    return Entry(**own, repeats=tuple(kept.get(f"repeats_{kept['unit']}", ())))


def circumstances(threads: int, plan: Plan) -> dict[str, Any]:
    """Tell where, when and with what a run measures.

    Args:
        threads: Threads per process.
        plan: How much is measured.

    Returns:
        What stands beside the entries in the JSON.
    """
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "machine": _machine(),
        "threads": threads,
        "busy_before": busy(),
        "versions": {"python": platform.python_version(), **_versions()},
        "protocol": asdict(plan),
    }


def write(path: Path, about: Mapping[str, Any], entries: Iterable[Entry]) -> None:
    """Write the results of a suite.

    Args:
        path: The file; its folder is made.
        about: What `circumstances` returned.
        entries: What was measured.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {**about, "cases": [entry.as_json() for entry in entries]}
    path.write_text(json.dumps(results, indent=1) + "\n")


def read(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Read the results of a suite.

    Args:
        path: The file.

    Returns:
        The circumstances, and the entries.
    """
    results = json.loads(path.read_text())
    entries = [entry_of(kept) for kept in results.pop("cases")]
    return results, entries


def physical_cores() -> int:
    """Count the physical cores that this process may use; all processors where that is unknown."""
    if not CPU_INFO.exists() or not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = {str(number) for number in os.sched_getaffinity(0)}
    processors = [_fields(block) for block in CPU_INFO.read_text().split("\n\n")]
    cores = {
        (p.get("physical id"), p.get("core id", p.get("processor")))
        for p in processors
        if p.get("processor") in allowed
    }
    return max(1, len(cores))


def busy() -> float | None:
    """Watch for a second what share of the processors is at work; None where that is unknown."""
    if not CPU_TIMES.exists():
        return None
    before = _times()
    time.sleep(WATCHED_S)
    idle, total = (after - then for after, then in zip(_times(), before, strict=True))
    return round(1.0 - idle / max(total, 1), 3)


def _times() -> tuple[int, int]:
    """Return the ticks that the processors have been idle, and all of them."""
    ticks = [int(field) for field in CPU_TIMES.read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _fields(block: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _machine() -> dict[str, Any]:
    cpu = _fields(CPU_INFO.read_text().split("\n\n")[0]) if CPU_INFO.exists() else {}
    flags = cpu.get("flags", "").split()
    return {
        "architecture": platform.machine(),
        "system": platform.system(),
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_family_model": f"{cpu.get('cpu family')}/{cpu.get('model')}",
        "vectors": [flag for flag in ("avx2", "fma", "avx512f", "avx512_bf16") if flag in flags],
        "physical_cores": physical_cores(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/topkast_func")
    return git("rev-parse", "HEAD") + (", topkast_func modified" if changed else "")
