"""Draw ``RESULTS.md``, its figures and the tables of the README: ``python -m benchmarks.page``."""

import re
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import nn

import topkast_func as tk
from benchmarks import views
from benchmarks.evidence import report
from benchmarks.evidence.settings import DEFAULTS, METHODS, USUAL, ZERO
from benchmarks.evidence.tasks import TASKS
from benchmarks.record import FIGURES, HERE, Results, load
from topkast_func.report.table import in_bytes

TEMPLATE, PAGE, README = HERE / "page.md", HERE / "RESULTS.md", HERE.parent / "README.md"
SHOWN = {"products": " 90%"}  # how the tasks end that are shown of a suite, if not all
MODELS = {1: (4096, 8), 7: (16384, 8), 100: (32768, 64)}  # by 10⁹ parameters: width, and ranks
BLOCK = (16, 16)
Evidence: TypeAlias = Mapping[str, report.Evidence]


def main() -> None:
    """Draw them all, from the JSON alone."""
    results, evidence = load(), report.ready()
    figures = {f"evidence_{task}": found.figure() for task, found in by_adam(evidence).items()}
    figures |= {"steps": views.steps_figure(results), "products": views.products_figure(results)}
    figures["jumps"] = report.jumps()
    for name, figure in figures.items():
        figure.savefig(FIGURES / f"{name}.png", dpi=100)
    PAGE.write_text(page(results, evidence))
    README.write_text(readme(README.read_text(), results, evidence))


def page(results: Results, evidence: Evidence) -> str:
    """Return the page: the template, with the tables in it."""
    told = {"plans": plans()}
    for suite in results.about:
        only = SHOWN.get(suite, "")
        tables = (views.case(results, suite, case, only) for case in results.cases(suite))
        told |= {suite: "\n\n".join(tables), f"{suite}_where": results.where(suite)}
    for task, found in evidence.items():
        told |= {
            task: found.table(),
            f"{task}_standing": "\n\n".join(map(found.standing, ("topkast", ZERO, DEFAULTS))),
            f"{task}_ablations": found.ablation_table(),
        }
    return TEMPLATE.read_text().format_map(told)


def plans() -> str:
    """Return what training large models would take by `tk.plan`; nothing is measured."""
    tables = []
    for billions, (width, ranks) in MODELS.items():
        model = linear(billions, width)
        entries, blocks = (
            tk.plan(model, tk.TopKastConfig(*USUAL, block_shape=block), ranks)
            for block in ((1, 1), BLOCK)
        )
        names = {layout[:4]: layout.name for layout in entries.layouts}
        for layout in blocks.layouts:  # which may be as large
            names.setdefault(layout[:4], f"{layout.name}, {BLOCK[0]}×{BLOCK[1]} blocks")
        title = f"{billions}·10⁹ parameters in layers of {width}×{width}, each of {ranks} ranks"
        rows = [(name, *map(in_bytes, layout[1:])) for layout, name in names.items()]
        tables.append(views.markdown((title, "device", "host", "sent in a step"), rows))
        tables.append(f"Single entries: {entries.notes[0]}. Blocks: {blocks.notes[0]}.")
    return "\n\n".join(tables)


def linear(billions: float, width: int) -> nn.Sequential:
    """Return square layers on the meta device, of about so many parameters together."""
    count = round(billions * 1e9 / width**2)
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


def readme(text: str, results: Results, evidence: Evidence) -> str:
    """Put the short tables into a README, each between ``<!-- name -->`` and ``<!-- end -->``."""
    for name, table in {"accuracy": accuracy(evidence), "steps": views.steps(results)}.items():
        place = rf"(?s)(<!-- {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(place, rf"\g<1>{table}\n\2", text)
        if found != 1:
            raise ValueError(f"the README must have <!-- {name} --> and <!-- end --> once")
    return text


def by_adam(evidence: Evidence) -> Evidence:
    """Return the tasks that Adam trains, which every method is run on."""
    return {task: found for task, found in evidence.items() if TASKS[task].momentum is None}


def accuracy(evidence: Evidence) -> str:
    """Return what every method reaches on every task at 90 / 80 %, and to whom Top-KAST loses."""
    evidence = by_adam(evidence)
    methods = [DEFAULTS if method == ZERO else method for method in METHODS]
    cells = {m: [report.cell(found.of(m, USUAL)) for found in evidence.values()] for m in methods}
    head = ["method", *(f"{TASKS[task].title}, {TASKS[task].unit}" for task in evidence)]
    told = []
    for task, found in evidence.items():
        lost = [report.name(m) for m in methods if found.margin(DEFAULTS, m, USUAL) < 0]
        told.append(f"{TASKS[task].title}: {', '.join(lost) or 'nobody'}")
    table = views.markdown(head, [(report.name(m), *cells[m]) for m in methods])
    words = f"{DEFAULTS.capitalize()} is behind, by more than the seeds spread"
    return f"{table}\n\n{words}: {'; '.join(told)}."


if __name__ == "__main__":
    main()
