"""The loss around a refresh, in the paper's form and from zero: ``-m benchmarks.evidence.jumps``.

Both train the network of the first task as tuned, on the same batches.
"""

import json
from itertools import islice

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from benchmarks.evidence import report
from benchmarks.evidence.settings import FIRST, ZERO
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.training import steps_of
from benchmarks.record import RESULTS, circumstances, write

PATH, METHODS = RESULTS / "jumps.json", ("topkast", ZERO)
FIRST_STEP, REFRESHES, EVERY = 950, 30, 100
"""Steps are told from half an interval before a refresh on, as means over so many refreshes."""


def main() -> None:
    """Train, and write the mean losses."""
    torch.set_num_threads(1)
    tuned, task, runs = report.load(FIRST).tuned, TASKS[FIRST], []
    for method in METHODS:
        torch.manual_seed(0)
        steps = steps_of(tuned[method], task, task.network(None))
        told = islice(steps, FIRST_STEP, FIRST_STEP + REFRESHES * EVERY)
        losses = torch.stack([step.metrics.data_loss for step in told]).view(REFRESHES, EVERY)
        means = [round(loss, 4) for loss in losses.mean(0).tolist()]
        runs.append({"setting": tuned[method].told(), "losses": means})
    write(PATH, {"about": circumstances(threads=1), "runs": runs})


def figure() -> Figure:
    """Draw the losses that were written."""
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for method, run in zip(METHODS, json.loads(PATH.read_text())["runs"], strict=True):
        axes.plot(range(-EVERY // 2, EVERY // 2), run["losses"], label=report.name(method))
    axes.set(xlabel="steps after a refresh", ylabel=f"loss, mean over {REFRESHES} refreshes")
    axes.set(title=TASKS[FIRST].title)
    axes.grid(alpha=0.2)
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
