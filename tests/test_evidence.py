"""The runs on real data: what there is, what is kept, and one in small."""

import json
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import topkast_func as tk
from benchmarks.evidence import report, tasks, training
from benchmarks.evidence.__main__ import keep
from benchmarks.evidence.networks import cnn, decoder, mlp
from benchmarks.evidence.settings import (
    DEFAULTS,
    METHODS,
    PAIRS,
    PLANS,
    SEEDS,
    SMALL,
    ZERO,
    Setting,
    ablations,
    comparison,
    trials,
    tuned,
)
from tests.eager import eager_step

TUNED = {name: Setting("mlp", name, **method.common) for name, method in METHODS.items()}


def test_every_method_has_as_many_trials_on_held_out_data() -> None:
    for task, carried, number in (
        ("mlp", None, 9),
        ("cnn", TUNED, 6),
        ("text", TUNED, 4),
        ("source", TUNED, 4),
        ("mlp_sgd", TUNED, 6),
    ):
        found = trials(task, carried)
        assert set(found) == set(PLANS[task].methods) <= set(METHODS)
        for method, settings in found.items():
            assert len(set(settings)) == number
            assert {(s.task, s.method, s.validate) for s in settings} == {(task, method, True)}
            assert {setting.seed for setting in settings}.isdisjoint(SEEDS)


@pytest.mark.parametrize("task", PLANS)
def test_what_was_chosen_leaves_every_method_as_many_trials(task: str) -> None:
    found = trials(task, report.carried(task))
    assert len({len(settings) for settings in found.values()}) == 1


def test_what_was_chosen_on_another_task_is_carried_on() -> None:
    chosen = TUNED | {"rigl": replace(TUNED["rigl"], drop_fraction=0.5)}
    assert {s.drop_fraction for s in trials("text", chosen)["rigl"]} == {0.5, 0.1}


def test_the_comparison_has_every_sparsity_and_seed_on_the_test_data() -> None:
    runs = list(comparison(TUNED))
    assert len(runs) == (1 + (len(METHODS) - 1) * len(PAIRS)) * len(SEEDS)
    assert not any(run.validate for run in runs)
    assert all(not setting.validate for _, setting in ablations(TUNED))


@pytest.mark.parametrize(
    ("build", "tolerance"), [(mlp, 0.12), (cnn, 0.3), (partial(decoder, 256, 4), 0.12)]
)
def test_a_small_network_has_about_the_parameters_asked_for(build: Any, tolerance: float) -> None:
    whole = sum(p.numel() for p in build(None).parameters())
    for share in (0.05, 0.2, 0.5):
        found = sum(p.numel() for p in build(share * whole).parameters())
        assert abs(found / (share * whole) - 1) < tolerance


def test_the_decoder_does_not_see_what_comes_after() -> None:
    network, codes = decoder(256, 4, None), torch.randint(0, 80, (1, 20))
    other = codes.clone()
    other[0, 12:] = 0
    with torch.no_grad():
        torch.testing.assert_close(network(codes)[:, :12], network(other)[:, :12])


@pytest.fixture
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (600,), generator=generator)
    inputs = torch.randn(600, 784, generator=generator)
    inputs += torch.randn(10, 784, generator=generator)[labels]
    parts = ((inputs[:500], labels[:500]), (inputs[500:], labels[500:]))
    monkeypatch.setattr(tasks, "_images", lambda shape, validate: parts)
    monkeypatch.setattr("topkast_func.make_train_step", eager_step)
    for module in (tasks, training):
        monkeypatch.setitem(module.TASKS, "mlp", tasks.TASKS["mlp"]._replace(steps=24))


@pytest.mark.usefixtures("_few_images")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_counts(method: str) -> None:
    until = 0.75 if method in {"set", "rigl", "gmp", ZERO} else None
    setting = replace(TUNED[method], refresh_every=8, lr=1e-3, until=until)
    result = training.run(setting)
    assert result["score"] > 60
    assert result["parameters"] < 80_000 or method in {"dense"}
    expected = {"dense": 1.0, "ste": 0.41, "topkast": 0.13, ZERO: 0.13, "random_backward": 0.13}
    if method in expected:
        assert result["flops"] == pytest.approx(expected[method], abs=0.02)
    if method in {"set", "rigl", "topkast", ZERO}:
        assert 0.1 < result["explored"] < 0.3


@pytest.mark.usefixtures("_few_images")
def test_a_run_may_train_by_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tasks, training):
        monkeypatch.setitem(module.TASKS, "mlp_sgd", tasks.TASKS["mlp"]._replace(momentum=0.9))
    setting = replace(TUNED[ZERO], task="mlp_sgd", refresh_every=8, lr=0.1)
    first = next(training.steps_of(setting, tasks.TASKS["mlp_sgd"], mlp(None)))
    assert list(first[1].optimizer.slots) == ["sgd.momentum"]
    assert training.run(setting)["score"] > 60


@pytest.mark.usefixtures("_few_images")
def test_a_refresh_is_told_by_its_shock() -> None:
    setting = replace(TUNED["topkast"], refresh_every=12)
    middle, largest = training.run(setting)["shock"]
    assert middle == largest > 0.0
    assert training.run(replace(setting, refresh_every=1))["shock"] is None


def test_losses_around_refreshes_begin_half_an_interval_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = ((0, 0, SimpleNamespace(data_loss=torch.tensor(float(i))), 0) for i in count())
    monkeypatch.setattr(training, "steps_of", lambda *_: steps)
    found = training.jumps(replace(TUNED["topkast"], refresh_every=100), refreshes=2)
    assert found == [1000.0 + step for step in range(100)]


def test_what_was_run_is_kept_and_found_again(tmp_path: Path) -> None:
    path, setting = tmp_path / "evidence.json", trials("mlp")["rigl"][3]
    keep(path, setting, {"score": 88.0})
    found = report.read(path)[setting]
    assert (found["setting"], found["score"]) == (setting.told(), 88.0)
    assert found["date"]
    assert "commit" in found
    assert replace(setting, seed=7) not in report.read(path)
    lines = path.read_text().splitlines()
    assert len(lines) == 6
    assert json.loads("\n".join(lines))["about"]["machine"]


def test_runs_of_any_layout_are_kept_on_a_line_each(tmp_path: Path) -> None:
    path, settings = tmp_path / "old.json", trials("mlp")["rigl"][:2]
    runs = [{"setting": s.told(), "score": 1.0} for s in settings]
    path.write_text(json.dumps({"about": {}, "runs": runs}, indent=1))
    assert list(report.read(path).items()) == list(zip(settings, runs, strict=True))
    keep(path, replace(settings[0], seed=7), {"score": 2.0})
    assert len(path.read_text().splitlines()) == 8
    assert list(report.read(path).values())[:2] == runs


def runs_of(tuned: dict[str, Setting]) -> dict[Setting, dict[str, Any]]:
    score = {"dense": 90.0, SMALL: 85.0, "ste": 88.5}
    return {
        s: {"score": score.get(s.method, 88.0) + s.seed - s.forward, "flops": 0.25}
        for s in comparison(tuned)
    }


@pytest.mark.parametrize(("task", "carried", "best"), [("mlp", None, -1), ("text", TUNED, 0)])
def test_the_best_trial_is_chosen_in_the_direction_of_the_score(
    task: str, carried: Any, best: int
) -> None:
    found = trials(task, carried)
    runs = {s: {"score": float(i)} for f in found.values() for i, s in enumerate(f)}
    expected = {m: replace(f[best], validate=False, steps=1.0) for m, f in found.items()}
    chosen = dict(tuned(runs, task, carried))
    default, config = chosen.pop(DEFAULTS), tk.TopKastConfig()
    assert chosen == expected
    explored = replace(expected[ZERO], penalty_weight=config.penalty_weight, until=None)
    assert default == explored
    assert default.refresh_every == config.refresh_every
    assert tk.topkast(default.entry, default.exchange) == config.method
    del runs[found["ste"][0]]
    with pytest.raises(ValueError, match=r"method='ste'.* was not run"):
        tuned(runs, task, carried)


def test_tables_and_figure_show_means_and_spread() -> None:
    found = report.Evidence("mlp", runs_of(TUNED), TUNED)
    assert "| topkast | 88.20 ± 1.00 (0.25×) | 88.10 ± 1.00 (0.25×) |" in found.table()
    assert (
        "| method | 80 / 50 % | 90 / 80 % | 95 / 90 % | 98 / 95 % | shock at 90 / 80 % |"
        in found.table()
    )
    told = {s: {**run, "shock": (1.0 + s.seed, 9.0)} for s, run in found.runs.items()}
    table = found._replace(runs=told).table()
    assert "(0.25×) | 2.00 (9.00) |" in table
    assert table.count("| no sets |") == 2
    often = {method: replace(setting, refresh_every=1) for method, setting in TUNED.items()}
    assert (
        "(0.25×) | sets of each step |" in found._replace(runs=runs_of(often), tuned=often).table()
    )
    assert "| dense | 90.20 ± 1.00 (0.25×) | 90.20 ± 1.00 (0.25×) |" in found.table()
    labels = found.figure().axes[0].get_legend_handles_labels()[1]
    assert {"topkast", "random backward", "dense"} <= set(labels)
    ablated = {
        s: {"score": 1.0 * s.refresh_every, "flops": 0.1}
        for name, s in ablations(TUNED)
        if name == "refresh_every"
    }
    table = found._replace(runs={**found.runs, **ablated}).ablation_table()
    assert "| refresh every | 10: 10.00 ± 0.00 (0.10×), 30: 30.00 ± 0.00 (0.10×), " in table


@pytest.mark.parametrize(("task", "sign"), [("mlp", 1), ("text", -1)])
def test_behind_and_ahead_is_what_differs_by_more_than_the_seeds_spread(
    task: str, sign: int
) -> None:
    chosen = {method: replace(setting, task=task) for method, setting in TUNED.items()}
    found = report.Evidence(task, runs_of(chosen), chosen)
    assert found.margin("topkast", "ste", PAIRS[1]) == 0.0
    assert found.margin("topkast", "dense", PAIRS[1]) == pytest.approx(sign * -2.1)
    assert found.margin("topkast", SMALL, PAIRS[1]) == pytest.approx(sign * 3.0)
    row = next(line for line in found.standing("topkast").splitlines() if "| 90 / 80 % |" in line)
    lost, won = (
        ("dense -2.10", "small dense +3.00") if sign > 0 else ("small dense -3.00", "dense +2.10")
    )
    assert row == f"| 90 / 80 % | {lost} | {won} |"


def test_what_was_not_run_is_behind_nobody() -> None:
    runs = {s: run for s, run in runs_of(TUNED).items() if s.method != "ste"}
    found = report.Evidence("mlp", runs, TUNED)
    assert found.margin("ste", "dense", PAIRS[0]) == 0.0
    assert "| ste |  |  |  |  |  |" in found.table()
