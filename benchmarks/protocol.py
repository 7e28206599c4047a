"""How a number comes about: arms in processes of their own, and rounds through them."""

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils.benchmark import Timer

from benchmarks.record import Entry

Parameters: TypeAlias = Mapping[str, Any]  # what an arm's process needs to know, as JSON holds it
Cases: TypeAlias = Mapping[str, Mapping[str, Parameters]]  # arms by name, by case; dense ones first
Tasks: TypeAlias = Mapping[str, tuple[Callable[[], Any], Callable[[Any], None]]]
"""What an arm is timed at: by name a call, and a check that raises if what it returns is wrong."""

Numbers: TypeAlias = Mapping[str, float]  # by task
Work: TypeAlias = Callable[[Parameters], Any]
"""Makes the tasks of an arm or, where a number takes a process of its own, its numbers."""

WARM_UP_CALLS = 2
FOLDERS = re.compile(r"(?<!\w)/(?:[^\s/:'\"]+/)+")


class Plan(NamedTuple):
    """How much is measured."""

    repeats: int = 9  # rounds through the arms of a case
    sample_s: float = 0.005  # least duration of one sample
    settle_s: float = 0.01  # pause before a turn, until the threads of the last process sleep
    fresh_repeats: int = 3  # rounds where a number takes a process


class Suite(NamedTuple):
    """One question, and how it is put."""

    name: str
    cases: Cases
    work: Work
    fresh: bool = False  # whether a number takes a process of its own
    unit: str = "s"


def run(
    suite: Suite, case: str, arms: Mapping[str, Parameters], threads: int, plan: Plan
) -> Iterator[Entry]:
    """Measure a case; an arm that fails leaves an entry with its error."""
    with ExitStack() as running:
        if suite.fresh:
            turns = {n: partial(fresh, suite.work, p, threads) for n, p in arms.items()}
        else:
            own = {name: running.enter_context(process(threads)) for name in arms}
            turns = {n: partial(_turn, own[n], suite.work, p, plan) for n, p in arms.items()}
        untimed = 0 if suite.fresh else 1  # in which arms are built, checked and warmed up
        found = rounds(turns, plan.fresh_repeats if suite.fresh else plan.repeats + untimed)
    for name, (answers, error) in found.items():
        for task in answers[0] if answers else [""]:
            entry: dict[str, Any] = {"suite": suite.name, "case": case, "arm": name, "task": task}
            entry |= {"parameters": arms[name], "unit": suite.unit}
            if repeats := [answer[task] for answer in answers[untimed:]]:
                entry[f"median_{suite.unit}"] = statistics.median(repeats)
            entry[f"repeats_{suite.unit}"] = repeats
            yield entry | ({"error": error} if error else {})


def rounds(
    turns: Mapping[str, Callable[[], Numbers]], repeats: int
) -> dict[str, tuple[list[Numbers], str | None]]:
    """Give every arm its turn, round by round, forwards and backwards alternately.

    One that raises takes no further part. Returned is what each has answered, and why no more.
    """
    answers: dict[str, list[Numbers]] = {name: [] for name in turns}
    errors: dict[str, str] = {}
    for repeat in range(repeats):
        order = [name for name in turns if name not in errors]
        for name in order[:: 1 if repeat % 2 == 0 else -1]:
            try:
                answers[name].append(turns[name]())
            except Exception as reason:  # of any library, or the end of a process
                errors[name] = told(reason)
    return {name: (answers[name], errors.get(name)) for name in turns}


def told(reason: Exception) -> str:
    """Return the first line of an error, without the folders of the machine."""
    return FOLDERS.sub("", f"{type(reason).__name__}: {reason}".splitlines()[0])


def process(threads: int) -> ProcessPoolExecutor:
    """Return a process that computes with so many threads and ends with its context."""
    return ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,))


def fresh(work: Callable[[Parameters], Any], parameters: Parameters, threads: int) -> Any:
    """Return what work comes to in a process of its own."""
    with process(threads) as own:
        return own.submit(work, parameters).result()


def _turn(own: ProcessPoolExecutor, work: Work, parameters: Parameters, plan: Plan) -> Numbers:
    time.sleep(plan.settle_s)
    return own.submit(_time, work, parameters, plan.sample_s).result()


_timers: dict[str, Timer] = {}
"""Of the tasks of an arm, in its process."""


def _time(work: Work, parameters: Parameters, sample_s: float) -> Numbers:
    """Return, in the process of an arm, the seconds of a call of each of its tasks."""
    if not _timers:
        tasks: Tasks = work(parameters)
        for call, check in tasks.values():
            check(call())
            for _ in range(WARM_UP_CALLS):
                call()
        threads = torch.get_num_threads()
        _timers.update({
            name: Timer("call()", globals={"call": call}, num_threads=threads)
            for name, (call, _) in tasks.items()
        })
    return {name: t.blocked_autorange(min_run_time=sample_s).mean for name, t in _timers.items()}
