"""Measure suite by suite: ``python -m benchmarks``, an hour on two cores, or a part of it.

``python -m benchmarks gpu`` is for a GPU, see `gpu`. A suite replaces its file in
``benchmarks/results``; some cases of it go to ``runs/benchmarks``.
"""

import os
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import torch

from benchmarks import costs, gpu, products, ranks, record, steps
from benchmarks.protocol import Plan, run

_MORE = (steps.HALVES, costs.REFRESH, costs.MEMORY, costs.COMPILATION)
_ALL = (products.SUITE, steps.SUITE, steps.LOOPS, *_MORE, ranks.BYTES, ranks.SECONDS)
SUITES = {suite.name: suite for suite in _ALL}
SCRATCH = Path("runs") / "benchmarks"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def main() -> None:
    """Do what the command line says; after every case, print it and write what there is."""
    if sys.argv[1:2] == ["gpu"]:
        gpu.main(sys.argv[2:])
        return
    import psutil  # neither it nor matplotlib need be there for a GPU

    from benchmarks import views

    parser = ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=Plan().fresh_repeats, help="of processes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="per process")
    arguments = parser.parse_args()
    folder = SCRATCH if arguments.case else record.RESULTS
    plan = Plan()._replace(fresh_repeats=arguments.rounds)
    # Before the processes start; Inductor compiles in them, so that none of its own stay behind.
    os.environ |= dict.fromkeys(THREADS, str(arguments.threads))
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    for suite in arguments.suite:
        busy = psutil.cpu_percent(1.0) / 100  # with something else
        about = record.circumstances(arguments.threads)
        about |= {"busy_before": busy, "protocol": plan._asdict()}
        entries: list[record.Entry] = []
        for case, arms in SUITES[suite].cases.items():
            if arguments.case in case:
                start = time.perf_counter()
                entries += run(SUITES[suite], case, arms, arguments.threads, plan)
                print(f"{suite}, {time.perf_counter() - start:.0f} s; busy before: {busy:.0%}")
                print(views.case(record.Results({}, entries), suite, case), flush=True)
                record.write(folder / f"{suite}.json", {**about, "cases": entries})


if __name__ == "__main__":
    main()
