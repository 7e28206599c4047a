"""The suites by name: which cases they have, and what a worker does for an arm."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks import anatomy, ceilings, choices, compilation, memory, products, refresh, steps
from benchmarks.protocol import Case, Parameters, Task


class Suite(NamedTuple):
    """One question, and how it is put.

    Attributes:
        cases: ``cases(full)``: all cases, or the few of a quick run.
        prepare: The tasks of an arm, to be timed in rounds; or None.
        measure: Numbers of an arm, from one fresh process each; or None.
        unit: Unit of the numbers.
    """

    cases: Callable[[bool], list[Case]]
    prepare: Callable[[Parameters], list[Task]] | None = None
    measure: Callable[[Parameters], dict[str, float]] | None = None
    unit: str = "s"


SUITES = {
    "products": Suite(products.cases, prepare=products.prepare),
    "steps": Suite(steps.cases, prepare=steps.prepare),
    "choices": Suite(choices.cases, prepare=steps.prepare),
    "anatomy": Suite(anatomy.cases, measure=anatomy.measure),
    "ceilings": Suite(ceilings.cases, prepare=ceilings.prepare),
    "refresh": Suite(refresh.cases, prepare=refresh.prepare),
    "memory": Suite(memory.cases, measure=memory.measure, unit="bytes"),
    "compilation": Suite(compilation.cases, measure=compilation.measure),
}
