"""Tune, compare, ablate: ``python -m benchmarks.evidence TASK``; what is done is not done again."""

from argparse import ArgumentParser
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import report
from benchmarks.evidence.settings import PLANS, ZERO, Setting, ablations, comparison, trials
from benchmarks.evidence.training import jumps, run
from benchmarks.record import circumstances, write


def keep(path: Path, setting: Setting, result: dict[str, Any]) -> None:
    """Add to a file what a setting came to, when and at which commit."""
    now = circumstances(threads=1)
    when = {key: now.pop(key) for key in ("date", "commit")}
    runs = {**report.read(path), setting: {"setting": setting.told(), **result, **when}}
    write(path, {"about": now, "runs": [*runs.values()]})


def complete(path: Path, settings: Iterable[Setting]) -> None:
    """Run what has no result in a file yet, one process with one thread on each core."""
    known = report.read(path)
    missing = [setting for setting in dict.fromkeys(settings) if setting not in known]
    cores, spawn = torch.cpu.get_capabilities()["num_physical_cores"], get_context("spawn")
    with ProcessPoolExecutor(cores, spawn, torch.set_num_threads, (1,)) as pool:
        jobs = {pool.submit(run, setting): setting for setting in missing}
        for done, job in enumerate(as_completed(jobs), 1):
            keep(path, jobs[job], job.result())
            print(f"{done}/{len(missing)} {jobs[job].told()} {job.result()}", flush=True)


def main() -> None:
    """Do what is not yet done of one task."""
    parser = ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("task", choices=PLANS)
    parser.add_argument("--ablations", action="store_true", help="run these too")
    parser.add_argument("--jumps", action="store_true", help="write the losses around refreshes")
    arguments = parser.parse_args()
    path = report.path(arguments.task)
    tried = trials(arguments.task, report.carried(arguments.task))
    complete(path, chain(*tried.values()))
    tuned = report.load(arguments.task).tuned
    complete(path, comparison(tuned))
    if arguments.ablations:
        complete(path, (setting for _, setting in ablations(tuned)))
        print(report.load(arguments.task).ablation_table())
    if arguments.jumps:
        torch.set_num_threads(1)
        runs = [{"setting": s.told(), "losses": jumps(s)} for s in (tuned["topkast"], tuned[ZERO])]
        write(report.JUMPS, {"about": circumstances(threads=1), "runs": runs})
    print(report.load(arguments.task).table())


if __name__ == "__main__":
    main()
