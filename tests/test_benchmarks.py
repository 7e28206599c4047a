"""The protocol of the benchmarks, its records and its pictures; no time is judged."""

import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import costs, products, record, steps, views
from benchmarks.__main__ import SUITES
from benchmarks.networks import NETWORKS, problem
from benchmarks.products import OneDNNLinear
from benchmarks.protocol import Plan, Suite, rounds, run, told
from benchmarks.record import Entry
from tests import stub_arms

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")

ABOUT = {
    "date": "2026-01-01",
    "machine": {"cpu": "a processor"},
    "threads": 2,
    "versions": {"torch": "2.13.0"},
}
SWIFT = Plan(repeats=3, sample_s=0.0, settle_s=0.0, fresh_repeats=2)


def stubs(names: str, asked: list[str], **dies_at: int) -> dict[str, Callable[[], dict[str, int]]]:
    """Make turns that take note of when they are asked, and take no time."""

    def turn(name: str) -> dict[str, int]:
        if asked.count(name) == dies_at.get(name):
            raise RuntimeError("it died")
        asked.append(name)
        return {"task": len(asked)}

    return {name: partial(turn, name) for name in names}


def test_rounds_go_forwards_and_backwards() -> None:
    asked: list[str] = []
    found = rounds(stubs("abc", asked), SWIFT.repeats)
    assert "".join(asked) == "abccbaabc"
    assert found["a"] == ([{"task": 1}, {"task": 6}, {"task": 7}], None)


def test_an_arm_that_dies_keeps_its_samples_and_leaves_the_rounds() -> None:
    asked: list[str] = []
    found = rounds(stubs("abc", asked, b=1), SWIFT.repeats)
    assert "".join(asked) == "abccaac"
    assert found["b"] == ([{"task": 2}], "RuntimeError: it died")
    assert found["a"][1] is None


def test_errors_are_told_without_the_folders_of_the_machine() -> None:
    reason = ImportError("no m (/home/someone/lib/m.so), 3/4 of it\nmore")
    assert told(reason) == "ImportError: no m (m.so), 3/4 of it"


def test_processes_take_turns_and_what_is_wrong_is_recorded() -> None:
    suite = Suite("copies", {}, stub_arms.timed)
    case = {way: {"way": way} for way in ("right", "wrong", "fails", "dies")}
    entries = {e["arm"]: e for e in run(suite, "tiny", case, 1, SWIFT)}
    assert list(entries) == list(case)
    assert entries["right"]["task"] == "task"
    assert len(entries["right"]["repeats_s"]) == SWIFT.repeats
    assert entries["right"]["median_s"] > 0
    assert "error" not in entries["right"]
    assert entries["wrong"]["error"] == "ArithmeticError: 0 is wrong"
    assert entries["wrong"]["repeats_s"] == []
    assert entries["fails"]["error"].startswith("TypeError: 'NoneType'")
    assert "terminated abruptly" in entries["dies"]["error"]


def test_where_a_number_takes_a_process_each_round_has_one() -> None:
    suite = Suite("numbers", {}, stub_arms.fresh, fresh=True, unit="bytes")
    processes, threads = run(suite, "tiny", {"arm": {}}, 1, SWIFT)
    assert (processes["task"], threads["task"]) == ("process", "threads")
    assert len(set(processes["repeats_bytes"])) == 2
    assert threads["repeats_bytes"] == [1.0, 1.0]
    assert threads["median_bytes"] == 1.0


def test_the_command_measures_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in (*command.THREADS, "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(variable, "1")
    suite = Suite("numbers", {"one": {"arm": {}}, "two": {"arm": {}}}, stub_arms.fresh, fresh=True)
    monkeypatch.setattr(command, "SUITES", {"numbers": suite})
    monkeypatch.setattr(command, "Plan", lambda: SWIFT._replace(fresh_repeats=1))
    monkeypatch.setattr(command, "SCRATCH", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--case", "two", "--threads", "1"])
    command.main()
    assert re.search(r"\| arm \| .* s \| 1 s \|", capsys.readouterr().out)
    about = json.loads((tmp_path / "numbers.json").read_text())
    assert [entry["case"] for entry in about["cases"]] == ["two", "two"]
    assert about["protocol"]["repeats"] == SWIFT.repeats
    assert 0 <= about["busy_before"] <= 1


def test_files_have_an_entry_on_every_line(tmp_path: Path) -> None:
    entries = [{"suite": "s", "case": "c", "arm": a, "task": "×", "unit": "s"} for a in "ab"]
    record.write(tmp_path / "new" / "s.json", {**ABOUT, "cases": entries})
    assert len((tmp_path / "new" / "s.json").read_text().splitlines()) == 2 + len(ABOUT) + 4
    assert record.load(tmp_path / "new") == ({"s": ABOUT}, entries)


def test_committed_files_have_an_entry_on_every_line() -> None:
    lines = 0
    for path in record.RESULTS.glob("*.json"):
        content = json.loads(path.read_text())
        (rows,) = (content[key] for key in ("cases", "runs") if key in content)
        lines += len(path.read_text().splitlines())
        assert len(path.read_text().splitlines()) == len(rows) + len(content) + 3
    assert lines < 4000


def test_medians_have_a_spread_of_at_least_two_numbers() -> None:
    entry: Entry = {"unit": "s", "repeats_s": [1.0, 2.0, 3.0, 4.0, 5.0], "median_s": 3.0}
    assert record.median(entry) == 3.0
    assert record.spread(entry) == pytest.approx(1 / 3)
    assert record.spread({"unit": "s", "repeats_s": [1.0]}) is None
    assert math.isnan(record.median({"unit": "bytes", "repeats_bytes": []}))


def test_circumstances_tell_machine_versions_and_commit() -> None:
    about = record.circumstances(2)
    assert about["versions"]["torch"] == torch.__version__
    assert about["machine"]["num_physical_cores"] >= 1
    assert about["machine"]["cpu"]
    assert len(about["commit"].split(",")[0]) == 40


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_take_their_batch_and_are_the_same_each_time(network: str) -> None:
    first, second = problem(network, 2), problem(network, 2)
    with torch.no_grad():
        assert torch.equal(first.model(first.batch[0]), second.model(second.batch[0]))
    assert first.batch[1].shape == (2,)


def test_a_layer_of_a_peer_computes_what_the_layer_it_replaces_does() -> None:
    own, theirs = problem("mlp-64", 4), steps.replaced(problem("mlp-64", 4), OneDNNLinear)
    assert isinstance(theirs.model.get_submodule("2"), OneDNNLinear)
    x, y = (own.batch[0].clone().requires_grad_() for _ in range(2))
    expected, found = own.model(x), theirs.model(y)
    torch.testing.assert_close(found, expected)
    for out in (expected, found):
        (out**2).sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    pairs = zip(own.model.parameters(), theirs.model.parameters(), strict=True)
    for one, other in pairs:
        assert one.grad is not None
        assert one.grad.abs().max() > 0
        torch.testing.assert_close(other.grad, one.grad)


def small(way: str, block: tuple[int, int] = (1, 1)) -> dict[str, object]:
    return {"side": 32, "batch": 8, "sparsities": (0.5, 0.9), "way": way, "block_shape": block}


def test_a_wrong_product_is_refused() -> None:
    for call, check in products.prepare(small("dense")).values():
        check(call())
        with pytest.raises(ArithmeticError, match=r"wrong by .* of its largest value"):
            check(call() * 1.001)


@pytest.mark.parametrize("way", products.WAYS)
def test_products_are_right(way: str) -> None:
    tasks = products.prepare(small(way, (4, 4)))
    assert len(tasks) == 6
    for call, check in tasks.values():
        check(call())


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_the_trained_state_is_counted_from_its_tensors(block: tuple[int, int]) -> None:
    told = {"network": "mlp-64", "optimizer": "adam", "way": "topkast", "block_shape": block}
    found = costs.exact({**told, "forward_sparsity": 0.9, "backward_sparsity": 0.8})
    dense = costs.exact({**told, "way": "dense"})
    weights, biases = 3 * 64 * 64, 3 * 64
    assert dense["trained state"] == 16 * (weights + biases)
    assert found["theta"] == 4 * weights
    values = 16 * (0.2 * weights + biases)
    assert values < found["trained state"] < 1.8 * values


def entry(
    suite: str, case: str, arm: str, task: str, *repeats: float, **parameters: object
) -> Entry:
    numbers = {"repeats_s": list(repeats), "median_s": sorted(repeats)[len(repeats) // 2]}
    where = {"suite": suite, "case": case, "arm": arm, "task": task, "parameters": parameters}
    return {**where, "unit": "s", **numbers}


@pytest.fixture
def results() -> record.Results:
    """Make results of one network: dense 10 ms, ours 20, 5 and 2 ms."""
    in_case = partial(entry, "steps", "mlp-784, sparsities")
    died = {"suite": "steps", "case": "mlp-784, sparsities", "arm": "SparseLab 90/90", "task": ""}
    ours = [(50, 20, 0.02), (90, 80, 0.005), (98, 95, 0.002)]
    products = [
        entry("products", "1024x1024/256", arm, f"{kind} {sparsity}%", seconds)
        for kind in ("forward", "input gradient", "weight gradient")
        for sparsity in (50, 90)
        for arm, seconds in (("dense", 1.0), ("topkast 1×1", 0.25))
    ]
    entries = [
        in_case("dense", "step", 0.014, 0.01, 0.01),
        in_case("dense oneDNN", "step", 0.008),
        {**died, "parameters": {}, "unit": "s", "repeats_s": [], "error": "it | died"},
        *(
            in_case(
                f"topkast 1×1 {forward}/{backward}",
                "step",
                seconds,
                series="topkast 1×1",
                forward_sparsity=forward / 100,
            )
            for forward, backward, seconds in ours
        ),
        *products,
    ]
    return record.Results({"steps": ABOUT, "products": ABOUT}, entries)


def test_tables_give_medians_spread_ratios_and_failures(results: record.Results) -> None:
    text = views.case(results, "steps", "mlp-784, sparsities")
    assert "| topkast 1×1 90/80 | 5 ms (2.00×, 1.60×) |" in text
    assert "| dense | 10 ms ± 10% |" in text
    assert "| SparseLab 90/90 | failed: it / died |" in text
    assert "| 784-512-512-10, batch 128 |  | 2.0× |  |  |" in views.steps(results)
    (row,) = (
        line
        for line in views.case(results, "products", "1024x1024/256", " 90%").splitlines()
        if "topkast" in line
    )
    assert row == "| topkast 1×1 | 250 ms (4.00×) | 250 ms (4.00×) | 250 ms (4.00×) |"


def test_figures_show_the_medians(results: record.Results) -> None:
    figure = views.steps_figure(results)
    first = {tuple(np.asarray(line.get_ydata())) for line in figure.axes[0].get_lines()}
    assert {(20.0, 5.0, 2.0), (10.0,) * 5, (8.0,) * 5} == first
    assert figure.axes[0].get_yscale() == "log"
    assert "a processor" in str(figure.get_suptitle())
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(legend) == {"topkast 1×1", "dense", "dense oneDNN"}
    speeds = views.products_figure(results).axes[2].get_lines()
    assert {tuple(np.asarray(line.get_ydata())) for line in speeds} == {(1.0, 1.0), (4.0, 4.0)}


def test_the_short_table_reads_arms_that_are_measured() -> None:
    costs = {"refresh", "memory", "compilation"}
    assert set(SUITES) == {"products", "steps", "loops", "halves", "ranks", "ranks_seconds"} | costs
    cases = SUITES["steps"].cases
    for network in steps.NETWORKS:
        for case, arm in views.COLUMNS.values():
            named = f"{network}, {case}"
            assert arm in cases[named] if named in cases else network == steps.IMAGES


@pytest.mark.parametrize("suite", SUITES)
def test_what_is_committed_is_what_is_measured(suite: str) -> None:
    committed = record.load()
    assert set(committed.cases(suite)) == set(SUITES[suite].cases)
    for case in committed.cases(suite):
        assert {e["arm"] for e in committed.of(suite, case)} <= set(SUITES[suite].cases[case])
