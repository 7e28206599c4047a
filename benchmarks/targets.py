"""What the library set out to reach, and what of it is measured."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.reading import Results
from benchmarks.steps import BLOCKS, DENSE, ONEDNN, USUAL, shown

SMALL, MIDDLE, LARGE = "mlp-784", "mlp-1024", "mlp-2048"
REFRESH_EVERY = 100


class Target(NamedTuple):
    """One thing to reach.

    Attributes:
        what: In words.
        floor: What must be reached.
        aim: What was hoped for.
        measured: Reads it from the results.
        beside_onednn: The same against dense products in oneDNN, where that says something.
        shown: Format of the numbers.
        more: Whether more is better.
    """

    what: str
    floor: float
    aim: float
    measured: Callable[[Results], float | None]
    beside_onednn: Callable[[Results], float | None] = lambda results: None
    shown: str = "{:.1f}×"
    more: bool = True

    def verdict(self, results: Results) -> str:
        """Say what is reached: the aim, the floor, nothing yet, or less."""
        measured = self.measured(results)
        if measured is None:
            return "not measured"
        sign = 1 if self.more else -1
        if sign * measured >= sign * self.aim:
            return "aim"
        return "floor" if sign * measured >= sign * self.floor else "missed"


def targets() -> list[Target]:
    """Return the targets, in the order of the table."""
    return [*_products(), *_steps(), *_peers(), *_others()]


def _products() -> Iterator[Target]:
    for case, floor, aim in (("1024x1024/256", 5.5, 9.0), ("2048x2048/512", 4.5, 7.0)):
        for product in ("forward", "input gradient"):
            what = f"{product}, unstructured, 90 %, {case}"
            yield _product(what, case, f"{product} 90%", "topkast 1×1", floor, aim)
        what = f"weight gradient on 20 %, {case}"
        yield _product(what, case, "weight gradient 80%", "topkast 1×1", 2.5, 4.0)
    for case, floor, aim in (("1024x1024/256", 14.0, 30.0), ("2048x2048/512", 11.0, 20.0)):
        what = f"forward, 4×1 blocks, 90 %, {case}"
        yield _product(what, case, "forward 90%", "topkast 4×1", floor, aim)


def _product(what: str, case: str, task: str, arm: str, floor: float, aim: float) -> Target:
    return Target(
        f"{what}, over torch's dense",
        floor,
        aim,
        lambda results: results.ratio("products", case, task, ["dense"], [arm]),
        lambda results: results.ratio("products", case, task, ["dense oneDNN"], [arm]),
    )


def _steps() -> Iterator[Target]:
    unstructured = [f"topkast 1×1 {shown(USUAL)}"]
    for network, floor, aim in ((LARGE, 4.5, 6.0), (MIDDLE, 5.0, 7.0), (SMALL, 3.0, 4.5)):
        what = f"step 90/80, unstructured, {network}"
        yield _step(what, f"{network}, sparsities", unstructured, floor, aim)
    blocks = [f"topkast {rows}×{columns} {shown(USUAL)}" for rows, columns in BLOCKS]
    what = f"step 90/80, best block of at most 16 entries, {LARGE}"
    yield _step(what, f"{LARGE}, blocks", blocks, 8.0, 12.0)


def _step(what: str, case: str, arms: list[str], floor: float, aim: float) -> Target:
    return Target(
        f"{what}, over the fastest of dense eager and compiled",
        floor,
        aim,
        lambda results: results.ratio("steps", case, "step", DENSE, arms),
        lambda results: results.ratio("steps", case, "step", [ONEDNN], arms),
    )


def _peers() -> Iterator[Target]:
    for network in (LARGE, MIDDLE, SMALL):
        case = f"{network}, sparsities"
        yield Target(
            f"step 90/90, {network}, over SparseLab 90 %",
            2.2,
            3.5,
            lambda results, case=case: results.ratio(  # type: ignore[misc]
                "steps", case, "step", ["SparseLab 90/90"], ["topkast 1×1 90/90"]
            ),
        )
    yield Target(
        f"step 90/80, {SMALL}, over torch-sparse as the seed uses it",
        40.0,
        80.0,
        lambda results: results.ratio(
            "steps",
            f"{SMALL}, engines",
            "step",
            ["torch-sparse on B 90/80"],
            ["topkast 1×1 90/80"],
        ),
    )


def _others() -> Iterator[Target]:
    yield Target(
        "both masks of 16.8 M entries, in copies of the tensor",
        5.0,
        2.0,
        lambda results: results.ratio("refresh", "16.8 M entries", "call", ["masks 1×1"], ["copy"]),
        more=False,
    )
    yield Target(
        f"share of refreshes in the run time, N = {REFRESH_EVERY}, {LARGE}",
        0.05,
        0.01,
        _refresh_share,
        shown="{:.1%}",
        more=False,
    )
    yield Target(
        "bytes of trained state, 90/80, over dense Adam",
        0.35,
        0.25,
        lambda results: results.ratio(
            "memory", LARGE, "trained state", ["topkast 1×1 90/80"], ["dense"]
        ),
        shown="{:.2f}",
        more=False,
    )


def _refresh_share(results: Results) -> float | None:
    steps = results.ratio("refresh", LARGE, "call", ["refresh 1×1"], ["step"])
    return None if steps is None else steps / (steps + REFRESH_EVERY)
