"""Draw ``RESULTS.md``, its figures and the tables of the README: ``python -m benchmarks.page``."""

import re
from collections.abc import Mapping
from typing import TypeAlias

from benchmarks import plans, views
from benchmarks.evidence import jumps, report
from benchmarks.evidence.settings import METHODS, USUAL, ZERO
from benchmarks.evidence.tasks import TASKS
from benchmarks.record import FIGURES, HERE, Results, load

TEMPLATE, PAGE, README = HERE / "page.md", HERE / "RESULTS.md", HERE.parent / "README.md"
SHOWN = {"products": " 90%"}  # how the tasks end that are shown of a suite, if not all
Evidence: TypeAlias = Mapping[str, report.Evidence]


def main() -> None:
    """Draw them all, from the JSON alone."""
    results, evidence = load(), report.ready()
    figures = {f"evidence_{task}": found.figure() for task, found in evidence.items()}
    figures |= {"steps": views.steps_figure(results), "products": views.products_figure(results)}
    figures["jumps"] = jumps.figure()
    for name, figure in figures.items():
        figure.savefig(FIGURES / f"{name}.png", dpi=100)
    PAGE.write_text(page(results, evidence))
    README.write_text(readme(README.read_text(), results, evidence))


def page(results: Results, evidence: Evidence) -> str:
    """Return the page: the template, with the tables in it."""
    told = {"plans": plans.tables()}
    for suite in results.about:
        only = SHOWN.get(suite, "")
        tables = (views.case(results, suite, case, only) for case in results.cases(suite))
        told |= {suite: "\n\n".join(tables), f"{suite}_where": results.where(suite)}
    for task, found in evidence.items():
        told |= {
            task: found.table(),
            f"{task}_standing": "\n\n".join(map(found.standing, ("topkast", ZERO))),
            f"{task}_ablations": found.ablation_table(),
        }
    return TEMPLATE.read_text().format_map(told)


def readme(text: str, results: Results, evidence: Evidence) -> str:
    """Put the short tables into a README, each between ``<!-- name -->`` and ``<!-- end -->``."""
    for name, table in {"accuracy": accuracy(evidence), "steps": views.steps(results)}.items():
        place = rf"(?s)(<!-- {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(place, rf"\g<1>{table}\n\2", text)
        if found != 1:
            raise ValueError(f"the README must have <!-- {name} --> and <!-- end --> once")
    return text


def accuracy(evidence: Evidence) -> str:
    """Return what every method reaches on every task at 90 / 80 %, and to whom Top-KAST loses."""
    cells = {m: [report.cell(found.of(m, USUAL)) for found in evidence.values()] for m in METHODS}
    head = ["method", *(f"{TASKS[task].title}, {TASKS[task].unit}" for task in evidence)]
    told = []
    for task, found in evidence.items():
        lost = [report.name(m) for m in METHODS if found.margin(ZERO, m, USUAL) < 0]
        told.append(f"{TASKS[task].title}: {', '.join(lost) or 'nobody'}")
    table = views.markdown(head, [(report.name(m), *cells[m]) for m in METHODS])
    words = f"{ZERO.capitalize()} is behind, by more than the seeds spread"
    return f"{table}\n\n{words}: {'; '.join(told)}."


if __name__ == "__main__":
    main()
