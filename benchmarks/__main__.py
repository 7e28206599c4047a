"""Measure, draw, or print: ``python -m benchmarks [plot | table]``."""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks import driver, plots, reading, tables
from benchmarks.protocol import FULL, QUICK, Case
from benchmarks.record import Entry, circumstances, physical_cores, write
from benchmarks.suites import SUITES

HERE = Path(__file__).parent
QUIET = 0.05
"""Largest share of the processors that may be at work before a suite starts, without a word."""

COMMITTED, FIGURES, SCRATCH = HERE / "results", HERE / "figures", Path("runs") / "benchmarks"


def main() -> None:
    """Do what the command line says."""
    arguments = _parser().parse_args()
    {"run": _run, "plot": _plot, "table": _table}[arguments.action](arguments)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("action", nargs="?", choices=("run", "plot", "table"), default="run")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few minutes (the default)")
    size.add_argument("--full", action="store_true", help="every case; below an hour on 2 cores")
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--arm", default="", help="only arms whose name contains this")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="per process")
    parser.add_argument("--results", type=Path, help="folder of the JSON files")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the pictures")
    return parser


def _run(arguments: Namespace) -> None:
    """Measure suite by suite; after every case, write what there is."""
    plan = FULL if arguments.full else QUICK
    whole = arguments.full and not (arguments.case or arguments.arm)
    folder = arguments.results or (COMMITTED if whole else SCRATCH)
    if not any(case for suite in arguments.suite for case in _chosen(suite, arguments)):
        raise SystemExit("no case has such a name and such an arm")
    for suite in arguments.suite:
        about, entries = circumstances(arguments.threads, plan), list[Entry]()
        if (about["busy_before"] or 0.0) > QUIET:
            print(f"{suite}: the machine is {about['busy_before']:.0%} busy with something else")
        for case in _chosen(suite, arguments):
            start = time.perf_counter()
            entries += driver.run(suite, case, arguments.threads, plan)
            seconds = time.perf_counter() - start
            print(f"{suite}: {case.name}: {len(case.arms)} arms, {seconds:.0f} s", flush=True)
            write(folder / f"{suite}.json", about, entries)


def _chosen(suite: str, arguments: Namespace) -> Iterator[Case]:
    for case in SUITES[suite].cases(arguments.full):
        arms = tuple(arm for arm in case.arms if arguments.arm in arm.name)
        if arguments.case in case.name and arms:
            yield Case(case.name, arms)


def _plot(arguments: Namespace) -> None:
    for path in plots.save(reading.load(arguments.results or COMMITTED), arguments.figures):
        print(path)


def _table(arguments: Namespace) -> None:
    print(tables.every_table(reading.load(arguments.results or COMMITTED)))


if __name__ == "__main__":
    main()
