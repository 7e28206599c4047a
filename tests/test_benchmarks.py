"""The protocol of the benchmarks, its records and its pictures; no time is judged."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import ceilings, driver, plots, products, reading, record, steps, tables, targets
from benchmarks.multiplication import WAYS
from benchmarks.networks import NETWORKS, problem, replaced
from benchmarks.peers import OneDNNLinear, TorchSparseLinear
from benchmarks.protocol import FULL, QUICK, Arm, Case, Plan, interleaved, sample
from benchmarks.record import Entry
from benchmarks.suites import SUITES
from topkast_func import Masks
from topkast_func.kernels import pattern, tiles

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script. is deprecated:DeprecationWarning"),
]

ABOUT = {
    "date": "2026-01-01",
    "machine": {"cpu": "a processor"},
    "threads": 2,
    "versions": {"torch": "2.13.0"},
}
SWIFT = Plan(repeats=3, at_least=2, sample_s=0.0, settle_s=0.0, fresh_repeats=2)


class Stub:
    """Takes note of when it is asked, and takes no time."""

    def __init__(self, name: str, asked: list[str], dies_at: int | None = None) -> None:
        self.name, self.asked, self.dies_at = name, asked, dies_at

    def time(self, task: str) -> float:
        if self.asked.count(self.name) == self.dies_at:
            raise RuntimeError("it died")
        self.asked.append(self.name)
        return float(len(self.asked))


def stubs(names: str, asked: list[str], **dies_at: int) -> dict[str, Stub]:
    return {name: Stub(name, asked, dies_at.get(name)) for name in names}


def test_rounds_go_forwards_and_backwards() -> None:
    asked: list[str] = []
    samples = interleaved(stubs("abc", asked), "task", SWIFT)
    assert "".join(asked) == "abccbaabc"
    assert samples["a"].repeats == [1.0, 6.0, 7.0]


def test_an_arm_that_dies_keeps_its_samples_and_leaves_the_rounds() -> None:
    asked: list[str] = []
    samples = interleaved(stubs("abc", asked, b=1), "task", SWIFT)
    assert "".join(asked) == "abccaac"
    assert samples["b"] == ([2.0], "it died")
    assert samples["a"].error is None


def test_an_arm_over_its_budget_leaves_after_the_least_number_of_rounds() -> None:
    asked: list[str] = []
    interleaved(stubs("ab", asked), "task", replace(SWIFT, budget_s=0.0))
    assert "".join(asked) == "abba"


@pytest.mark.parametrize(("warm", "calls"), [(True, 2), (False, 1)])
def test_a_call_that_fills_the_sample_is_a_sample(warm: bool, calls: int) -> None:
    called: list[int] = []
    assert sample(lambda: called.append(1), 0.0, warm) >= 0.0
    assert len(called) == calls


def test_the_median_is_of_the_repeats_and_survives_the_file(tmp_path: Path) -> None:
    timed = Entry("steps", "c", "a", "step", {"x": 1}, (3.0, 1.0, 2.0), setup_s=0.5)
    failed = Entry("steps", "c", "b", error="no")
    held = Entry("memory", "c", "a", "peak", {}, (5.0,), "bytes")
    assert (timed.median, failed.median) == (2.0, None)
    kept = timed.as_json()
    assert (kept["median_s"], kept["min_s"], kept["repeats_s"]) == (2.0, 1.0, [3.0, 1.0, 2.0])
    record.write(tmp_path / "steps.json", ABOUT, [timed, failed, held])
    assert record.read(tmp_path / "steps.json") == (ABOUT, [timed, failed, held])


def test_errors_are_kept_without_the_folders_of_the_machine() -> None:
    error = "ImportError: no m (/home/someone/lib/m.so), 3/4 of it"
    assert Entry("s", "c", "a", error=error).as_json()["error"] == (
        "ImportError: no m (m.so), 3/4 of it"
    )


def test_circumstances_tell_machine_versions_and_protocol() -> None:
    about = record.circumstances(2, FULL)
    assert about["versions"]["torch"] == torch.__version__
    assert about["protocol"]["repeats"] == FULL.repeats
    assert about["machine"]["physical_cores"] >= 1


def test_workers_are_timed_in_turn_and_a_crash_is_recorded() -> None:
    arms = tuple(Arm(way, {"way": way, "side": 8}) for way in ("copy", "nothing", "masks"))
    case = Case("tiny", arms)
    entries = {entry.arm: entry for entry in driver.run("refresh", case, 1, SWIFT)}
    assert list(entries) == ["copy", "nothing", "masks"]
    assert len(entries["copy"].repeats) == SWIFT.repeats
    assert entries["copy"].setup_s is not None
    assert entries["nothing"].error == "KeyError: 'nothing'"
    assert entries["masks"].error == "KeyError: 'block_shape'"


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("full", [True, False])
def test_cases_and_arms_have_names_of_their_own(suite: str, full: bool) -> None:
    cases = SUITES[suite].cases(full)
    assert len({case.name for case in cases}) == len(cases) > 0
    for case in cases:
        assert len({arm.name for arm in case.arms}) == len(case.arms)


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_take_their_batch_and_are_the_same_each_time(network: str) -> None:
    first, second = problem(network, 2), problem(network, 2)
    with torch.no_grad():
        assert torch.equal(first.model(first.inputs), second.model(second.inputs))
    assert first.targets.shape == (2,)


@pytest.mark.parametrize(
    "layer_of",
    [
        lambda name, linear: OneDNNLinear(linear),
        lambda name, linear: TorchSparseLinear(
            linear, Masks(*[torch.ones_like(linear.weight, dtype=torch.bool)] * 2)
        ),
    ],
    ids=["oneDNN", "torch-sparse"],
)
def test_a_layer_of_a_peer_computes_what_the_layer_it_replaces_does(
    layer_of: Callable[[str, nn.Linear], nn.Module],
) -> None:
    own, theirs = problem("mlp-64", 4), problem("mlp-64", 4)
    replaced(theirs.model, layer_of)
    x, y = own.inputs.clone().requires_grad_(), own.inputs.clone().requires_grad_()
    expected, found = own.model(x), theirs.model(y)
    torch.testing.assert_close(found, expected)
    for out in (expected, found):
        (out**2).sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    for index in (0, 2, 4):
        layers = own.model.get_submodule(str(index)), theirs.model.get_submodule(str(index))
        for expected, found in zip(*map(_gradients, layers), strict=True):
            assert expected.abs().max() > 0
            torch.testing.assert_close(found, expected)


def _gradients(layer: nn.Module) -> list[torch.Tensor]:
    """Return the gradients of the weight, laid flat, and of the bias."""
    grads = [p.grad.flatten() for p in layer.parameters() if p.grad is not None]
    return sorted(grads, key=len)


def test_a_wrong_product_is_refused() -> None:
    parameters = {"side": 16, "batch": 4, "sparsities": (0.5,), "way": "dense"}
    (task, *_) = products.prepare(parameters)
    task.check(task.run())
    with pytest.raises(ArithmeticError, match=r"wrong by .* of its largest value"):
        task.check(task.run() * 1.001)


@pytest.mark.parametrize("way", [w for w in WAYS if w not in {"SparseLab", "topkast"}])
def test_products_of_the_peers_are_right(way: str) -> None:
    parameters = {"side": 32, "batch": 8, "sparsities": (0.5, 0.9), "way": way}
    tasks = products.prepare(parameters)
    assert len(tasks) >= 6
    for task in tasks:
        task.check(task.run())


def results(tmp_path: Path) -> reading.Results:
    """Make results of one network: dense 10 ms, ours 20, 5 and 2 ms."""
    case = "mlp-784, sparsities"
    told = {"series": "topkast 1×1"}
    ours = [(0.5, 0.2, 0.02), (0.9, 0.8, 0.005), (0.98, 0.95, 0.002)]
    entries = [
        Entry("steps", case, "dense", "step", {"series": "dense"}, (0.012, 0.01, 0.01)),
        Entry("steps", case, "dense oneDNN", "step", {"series": "dense oneDNN"}, (0.008,)),
        Entry("steps", case, "SparseLab 90/90", error="it died"),
        *(
            Entry(
                "steps",
                case,
                f"topkast 1×1 {steps.shown((s, b))}",
                "step",
                {**told, "forward_sparsity": s, "backward_sparsity": b},
                (time,),
            )
            for s, b, time in ours
        ),
    ]
    record.write(tmp_path / "steps.json", ABOUT, entries)
    speeds = [("dense", 1.0), ("topkast 1×1", 0.25)]
    record.write(
        tmp_path / "products.json",
        ABOUT,
        [
            Entry(
                "products",
                "8x8/2",
                arm,
                f"{product} {s:.0%}",
                {"product": product, "sparsity": s},
                (time,),
            )
            for product in ("forward", "input gradient", "weight gradient")
            for s in (0.5, 0.9)
            for arm, time in speeds
        ],
    )
    return reading.load(tmp_path)


def test_figures_are_drawn_from_the_files(tmp_path: Path) -> None:
    found = results(tmp_path)
    paths = plots.save(found, tmp_path / "figures")
    assert [path.name for path in paths] == ["steps.png", "products.png"]
    assert all(path.stat().st_size > 0 for path in paths)
    (panel,) = plots.steps(found).axes
    curves = {str(line.get_label()): np.asarray(line.get_ydata()) for line in panel.get_lines()}
    assert curves["topkast 1×1"].tolist() == [20.0, 5.0, 2.0]
    assert curves["dense"].tolist() == [10.0, 10.0]
    assert panel.get_yscale() == "log"


def test_no_results_make_no_figure(tmp_path: Path) -> None:
    assert plots.save(reading.load(tmp_path), tmp_path) == []


@pytest.mark.parametrize(
    ("times", "found"),
    [((20.0, 5.0), 0.7), ((20.0, 15.0), None), ((5.0, 2.0), 0.5), ((10.0, 5.0), 0.5)],
)
def test_the_crossover_is_where_the_curve_meets_the_dense_line(
    times: tuple[float, float], found: float | None
) -> None:
    points = list(zip((0.5, 0.9), times, strict=True))
    assert plots.crossover(points, 10.0) == (None if found is None else pytest.approx(found))
    assert plots.crossover([], 10.0) is None


def test_tables_give_ratios_failures_and_verdicts(tmp_path: Path) -> None:
    found = results(tmp_path)
    text = tables.every_table(found)
    assert "| topkast 1×1 90/80 | 5 ms (2.00×, 1.60×) |" in text
    assert "| SparseLab 90/90 | failed: it died |" in text
    rows = {target.what: target for target in targets.targets()}
    row = rows["step 90/80, unstructured, mlp-784, over the fastest of dense eager and compiled"]
    assert row.measured(found) == pytest.approx(2.0)
    assert row.verdict(found) == "missed"
    assert row._replace(floor=1.5).verdict(found) == "floor"
    assert row._replace(floor=1.5, aim=2.0 - 1e-9).verdict(found) == "aim"


def test_targets_read_cases_and_arms_that_exist() -> None:
    names = {
        (suite, case.name, arm.name)
        for suite, kept in SUITES.items()
        for case in kept.cases(True)
        for arm in case.arms
    }
    asked: set[tuple[str, str, str]] = set()

    class Spy(reading.Results):
        def median(self, suite: str, case: str, task: str, *arms: str) -> float:
            asked.update((suite, case, arm) for arm in arms)
            return 1.0

    for target in targets.targets():
        target.measured(Spy({}, []))
        target.beside_onednn(Spy({}, []))
    assert asked
    assert asked <= names
    assert len(SUITES["steps"].cases(False)) < len(SUITES["steps"].cases(True))
    assert QUICK.repeats < FULL.repeats


@pytest.mark.parametrize("arm", ceilings.cases(full=False)[0].arms, ids=lambda arm: arm.name)
def test_the_inner_loops_are_those_of_the_products(arm: Arm) -> None:
    for task in ceilings.prepare(arm.parameters):
        found = task.run()
        task.check(found)
        with pytest.raises(ArithmeticError, match="wrong"):
            task.check(found * 1.001)


def test_sizes_of_tiles_are_changed_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_BYTES", 512)
    monkeypatch.setattr(pattern, "SEGMENT", 16)
    monkeypatch.setattr(pattern, "PANEL", (128, 1024))
    small = {"side": 64, "batch": 64, "sparsities": (0.9,)}
    _, case, _ = ceilings.cases(full=True)
    arm = next(arm for arm in case.arms if arm.name == "panel 64")
    for task in ceilings.prepare({**arm.parameters, **small}):
        task.check(task.run())
    assert (tiles.TILE_BYTES, pattern.SEGMENT) == (512, 16)
    assert pattern.PANEL == (64, 1024)
