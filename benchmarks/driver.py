"""Run a case: its workers one after another, then in rounds."""

from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.client import Worker, WorkerError
from benchmarks.protocol import Arm, Case, Plan, interleaved
from benchmarks.record import Entry
from benchmarks.suites import SUITES


def run(suite: str, case: Case, threads: int, plan: Plan) -> list[Entry]:
    """Measure a case. A worker that fails leaves an entry with its error.

    Args:
        suite: Name of the suite.
        case: The case.
        threads: Threads per worker.
        plan: How much is measured.

    Returns:
        The entries, arm by arm and task by task.
    """
    measures = SUITES[suite].measure is not None
    return list((_measured if measures else _timed)(suite, case, threads, plan))


def _timed(suite: str, case: Case, threads: int, plan: Plan) -> Iterator[Entry]:
    """Start every worker of the case, then time its tasks in rounds through the workers."""
    with ExitStack() as running:
        workers: dict[str, Worker] = {}
        entries: dict[tuple[str, str], Entry] = {}
        for arm in case.arms:
            try:
                worker = Worker(suite, arm.parameters, threads, plan.sample_s, plan.settle_s)
            except WorkerError as reason:
                blank = Entry(suite, case.name, arm.name, "", arm.parameters, error=str(reason))
                entries[arm.name, ""] = blank
                continue
            workers[arm.name] = running.enter_context(worker)
            entries.update({
                (arm.name, entry.task): entry
                for entry in _announced(Entry(suite, case.name, arm.name), arm, worker)
            })
        for task in dict.fromkeys(task for _, task in entries if task):
            able = {n: w for n, w in workers.items() if _can(entries.get((n, task)))}
            for name, samples in interleaved(able, task, plan).items():
                entries[name, task] = _with(entries[name, task], *samples)
        yield from entries.values()


def _announced(blank: Entry, arm: Arm, worker: Worker) -> Iterator[Entry]:
    """Yield an entry without numbers for each task that a worker has."""
    for task in worker.ready["tasks"]:
        yield Entry(
            blank.suite,
            blank.case,
            blank.arm,
            task["name"],
            {**arm.parameters, **task["parameters"]},
            setup_s=worker.ready["build_s"] + task.get("first_s", 0.0),
            error=task.get("error"),
        )


def _can(entry: Entry | None) -> bool:
    return entry is not None and entry.error is None


def _with(entry: Entry, repeats: list[float], error: str | None) -> Entry:
    return Entry(**{**vars(entry), "repeats": tuple(repeats), "error": error})


def _measured(suite: str, case: Case, threads: int, plan: Plan) -> Iterator[Entry]:
    """Start a fresh worker for every repeat of every arm, in rounds; each gives its numbers."""
    numbers: dict[tuple[str, str], list[float]] = {}
    errors: dict[str, str] = {}
    for _ in range(plan.fresh_repeats):
        for arm in case.arms:
            try:
                with Worker(suite, arm.parameters, threads) as worker:
                    for task, number in worker.ready["measured"].items():
                        numbers.setdefault((arm.name, task), []).append(number)
            except WorkerError as reason:
                errors[arm.name] = str(reason)
    for arm in case.arms:
        tasks = [task for name, task in numbers if name == arm.name] or [""]
        for task in tasks:
            yield Entry(
                suite,
                case.name,
                arm.name,
                task,
                arm.parameters,
                tuple(numbers.get((arm.name, task), ())),
                SUITES[suite].unit,
                error=errors.get(arm.name),
            )
