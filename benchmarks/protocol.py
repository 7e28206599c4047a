"""How a number comes about: samples of calls, rounds through the arms of a case, medians."""

import gc
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

Parameters: TypeAlias = Mapping[str, Any]
"""What tells one measurement from another, as JSON holds it."""

CACHED_S = 0.1
"""Calls shorter than this are repeated once, untimed, before a sample: others had the caches."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        repeats: Rounds through the arms of a case.
        at_least: Rounds that even a slow arm takes part in.
        budget_s: Seconds after which an arm sits the remaining rounds out.
        sample_s: Least duration of one sample; a longer call is a sample by itself.
        settle_s: Pause before a sample, until the threads of the last process sleep.
        fresh_repeats: Processes per arm where a process gives one number.
    """

    repeats: int = 9
    at_least: int = 5
    budget_s: float = 6.0
    sample_s: float = 0.005
    settle_s: float = 0.01
    fresh_repeats: int = 3


FULL = Plan()
QUICK = Plan(repeats=5, at_least=3, budget_s=2.0, fresh_repeats=1)


class Arm(NamedTuple):
    """One way of doing the work of a case.

    Attributes:
        name: Unique within its case.
        parameters: What its worker needs to know.
    """

    name: str
    parameters: Parameters


class Case(NamedTuple):
    """Arms that are compared with each other, in one run.

    Attributes:
        name: Unique within its suite.
        arms: In the order of the rounds, the dense ones first.
    """

    name: str
    arms: tuple[Arm, ...]


def accepted(output: Any) -> None:
    """Accept any output: there is nothing to compare it with."""


@dataclass(frozen=True)
class Task:
    """What an arm is timed at; the arms of a case are compared task by task.

    Attributes:
        name: Unique within its arm.
        run: One call.
        check: Raises if the output of a call is wrong.
        parameters: What tells the task from the others of its arm.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], None] = accepted
    parameters: Parameters = field(default_factory=dict)


class Timed(Protocol):
    """Something that times one sample of a task."""

    def time(self, task: str) -> float:
        """Return seconds per call."""


def sample(run: Callable[[], Any], at_least_s: float, warm: bool = True) -> float:
    """Time calls until they have taken long enough.

    Args:
        run: One call.
        at_least_s: Least duration of the sample, seconds.
        warm: Call once untimed before.

    Returns:
        Seconds per call.
    """
    gc.collect()
    gc.disable()
    try:
        if warm:
            run()
        calls, elapsed, start = 0, 0.0, time.perf_counter()
        while not calls or elapsed < at_least_s:
            run()
            calls += 1
            elapsed = time.perf_counter() - start
    finally:
        gc.enable()
    return elapsed / calls


class Samples(NamedTuple):
    """What an arm has shown of a task: seconds per call, and why there is no more of it."""

    repeats: list[float]
    error: str | None = None


def interleaved(arms: Mapping[str, Timed], task: str, plan: Plan) -> dict[str, Samples]:
    """Time a task in rounds through the arms, forwards and backwards in turn.

    Args:
        arms: What is timed, by name. One that raises RuntimeError takes no further part.
        task: Name of the task.
        plan: How often.

    Returns:
        Samples by name.
    """
    samples = {name: Samples([]) for name in arms}
    spent = dict.fromkeys(arms, 0.0)
    for repeat in range(plan.repeats):
        for name in _present(samples, spent, repeat, plan):
            start = time.perf_counter()
            try:
                samples[name].repeats.append(arms[name].time(task))
            except RuntimeError as reason:
                samples[name] = samples[name]._replace(error=str(reason))
            spent[name] += time.perf_counter() - start
    return samples


def _present(
    samples: Mapping[str, Samples], spent: Mapping[str, float], repeat: int, plan: Plan
) -> Collection[str]:
    """Name the arms of a round, in its order."""
    names = list(samples)[:: 1 if repeat % 2 == 0 else -1]
    in_budget = [n for n in names if repeat < plan.at_least or spent[n] < plan.budget_s]
    return [name for name in in_budget if samples[name].error is None]
