"""Tune, compare, ablate: ``python -m benchmarks.evidence TASK``; what is done is not done again."""

import argparse
import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import report
from benchmarks.evidence.settings import PLANS, Setting, ablations, comparison, trials
from benchmarks.evidence.training import run
from benchmarks.protocol import FULL
from benchmarks.record import circumstances, physical_cores

RESULTS, FIGURES = (Path(__file__).parents[1] / folder for folder in ("results", "figures"))


class Ledger:
    """What has been run, in a JSON file that grows.

    Args:
        path: The file; it is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        kept = json.loads(path.read_text()) if path.exists() else {"runs": []}
        self.runs: list[dict[str, Any]] = kept["runs"]

    def add(self, setting: Setting, result: dict[str, Any]) -> None:
        """Keep what a setting came to, when and at which commit, and write the file."""
        now = circumstances(1, FULL)
        when = {key: now[key] for key in ("date", "commit")}
        self.runs.append({"setting": setting.told(), **result, **when})
        about = {key: now[key] for key in ("machine", "threads", "versions")}
        self.path.write_text(json.dumps({"about": about, "runs": self.runs}, indent=1) + "\n")


def main() -> None:
    """Do what is not yet done of one task, print the tables and draw the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("task", choices=PLANS)
    parser.add_argument("--ablations", action="store_true", help="run these too")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the picture")
    arguments = parser.parse_args()
    task, folder = arguments.task, arguments.results
    if not arguments.report:
        ledger = Ledger(report.path(folder, task))
        _run(ledger, chain.from_iterable(trials(task, report.carried(folder, task)).values()))
        tuned = report.load(folder, task)[1]
        _run(ledger, comparison(tuned))
        _run(ledger, [s for _, s in ablations(tuned)] if arguments.ablations else [])
    runs, tuned = report.load(folder, task)
    print(report.table(runs, tuned), report.ablation_table(runs, tuned), sep="\n\n")
    report.figure(runs, tuned).savefig(arguments.figures / f"evidence_{task}.png", dpi=120)


def _run(ledger: Ledger, settings: Iterable[Setting]) -> None:
    """Run what has no result yet, one process with one thread on each core."""
    missing = [s for s in dict.fromkeys(settings) if report.find(ledger.runs, s) is None]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(physical_cores(), spawn, torch.set_num_threads, (1,)) as pool:
        jobs = {pool.submit(run, setting): setting for setting in missing}
        for done, job in enumerate(as_completed(jobs), 1):
            result = job.result()
            ledger.add(jobs[job], result)
            told = {k: v for k, v in asdict(jobs[job]).items() if k != "task"}
            print(f"{done}/{len(missing)} {result['score']:.2f} {told}", flush=True)


if __name__ == "__main__":
    main()
