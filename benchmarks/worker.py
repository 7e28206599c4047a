"""A process of its own for one arm: it builds, warms up, and times a sample whenever asked.

``python -m benchmarks.worker REQUEST`` reads one task name per line from stdin and answers each
with a line of JSON on stdout. Between two lines it sleeps. Whatever libraries print goes to
stderr.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

import torch

from benchmarks.protocol import CACHED_S, Task, sample
from benchmarks.suites import SUITES

WARM_UP_CALLS = 2


def main() -> None:
    """Serve the request of the command line until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    suite, parameters = SUITES[request["suite"]], request["parameters"]
    if suite.measure is not None:
        _answer(answers, measured=suite.measure(parameters))
    if suite.prepare is not None:
        start = time.perf_counter()
        tasks = suite.prepare(parameters)
        _serve(tasks, time.perf_counter() - start, request["sample_s"], answers)


def _serve(tasks: Iterable[Task], build_s: float, sample_s: float, answers: TextIO) -> None:
    ready = {task.name: task for task in tasks}
    reports = [_warmed_up(task) for task in ready.values()]
    gc.freeze()  # what is there now stays: collecting before a sample need not look at it
    _answer(answers, build_s=build_s, tasks=reports)
    durations = {report["name"]: report.get("last_s", 0.0) for report in reports}
    for line in sys.stdin:
        name = line.strip()
        warm = durations[name] < CACHED_S
        durations[name] = sample(ready[name].run, sample_s, warm)
        _answer(answers, seconds=durations[name])


def _warmed_up(task: Task) -> dict[str, Any]:
    """Call a task a few times and check what it returns; tell how long that took."""
    report: dict[str, Any] = {"name": task.name, "parameters": dict(task.parameters)}
    try:
        start = time.perf_counter()
        output = task.run()
        report["first_s"] = time.perf_counter() - start
        task.check(output)
        del output
        for _ in range(WARM_UP_CALLS):
            report["last_s"] = sample(task.run, 0.0, warm=False)
    except Exception as reason:  # of any library; the other tasks of the arm go on
        report["error"] = f"{type(reason).__name__}: {reason}".splitlines()[0]
    return report


def _answer(answers: TextIO, **message: Any) -> None:
    print(json.dumps(message), file=answers, flush=True)


if __name__ == "__main__":
    main()
