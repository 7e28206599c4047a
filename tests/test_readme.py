"""What the README shows runs, and its figures are those of the committed results."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

import topkast_func as tk
from benchmarks import arms, choices, networks, reading, tables
from benchmarks.evidence import report
from benchmarks.evidence.settings import PLANS, TUNING_SEED
from benchmarks.multiplication import FORWARD, INPUT_GRADIENT, OURS, WEIGHT_GRADIENT
from benchmarks.protocol import Case

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()
WORDS = " ".join(README.split())
NAMES = ("functional", "ordinary", "masks", "methods", "testing", "facade", "engines")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_commands_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", README)) <= set(targets)


def test_pictures_exist() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_boston_figures_are_those_measured() -> None:
    results = json.loads((RESULTS / "boston.json").read_text())
    median = results["median_test_mse"]
    splits = results["split_test_mse"]
    for several in splits.values():
        assert f"{min(several):.1f} to {max(several):.1f}" in README
    for figure in (
        f"{median['sparse']:.3g}",
        f"{median['dense']:.3g}",
        f"{results['mean_mse']:.3g}",
    ):
        assert re.search(rf"\| {re.escape(figure)} \|", README)


def test_tables_of_steps_and_targets_are_those_measured() -> None:
    results = reading.load(RESULTS)
    assert tables.overview(results) in README
    assert tables.target_table(results) in README


def test_figures_of_anatomy_compilation_and_memory_are_those_measured() -> None:
    results = reading.load(RESULTS)
    ours = "topkast 1×1 90/80"
    parts = {
        task: 1e3 * (results.median("anatomy", "mlp-2048", task, ours) or 0.0)
        for task in ("weight_gradient", "forward", "input_gradient", "rest")
    }
    gradient, forward, inputs, rest = (f"{part:.0f}" for part in parts.values())
    whole = f"{sum(parts.values()):.0f}"
    assert f"{gradient} of {whole} ms in the largest network" in WORDS
    assert f"forward product {forward}, input gradient {inputs}, all else {rest})" in WORDS
    cold, warm, dense_cold, dense_warm = (
        f"{results.median('compilation', 'mlp-784', task, arm):.1f}"
        for arm in (ours, "dense compiled")
        for task in ("cold", "warm")
    )
    assert f"{cold} s in the smallest network with empty caches, {warm} with full ones" in WORDS
    assert f"dense compiled takes {dense_cold} and {dense_warm} " in WORDS
    dense, sparse, blocks = (
        1e-6 * (results.median("memory", "mlp-2048", "trained state", arm) or 0.0)
        for arm in ("dense", ours, "topkast 4×4 90/80")
    )
    assert (
        f"takes {sparse:.1f} MB where dense takes {dense:.0f}, in 4×4 blocks {blocks:.1f}" in WORDS
    )


def test_figures_of_ceilings_and_products_are_those_measured() -> None:
    results = reading.load(RESULTS)
    loops = results.of("ceilings", "first-level cache, one thread", FORWARD)
    loop = next(entry for entry in loops if entry.arm == "16 of 32")
    speed = 2e-9 * loop.parameters["multiplications"] / (loop.median or math.inf)
    assert f"{speed:.0f} GFLOP/s on" in WORDS
    kinds = {"dense": "dense", "dense oneDNN": "dense", f"{OURS} 1×1": "single"}
    kinds |= {f"{OURS} {side}×{side}": "blocks" for side in (4, 8, 16)}
    tasks = {f"{product} 90%" for product in (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)}
    reached: dict[str, list[float]] = {kind: [] for kind in kinds.values()}
    for entry in (e for case in results.cases("products") for e in results.of("products", case)):
        if entry.arm in kinds and entry.task in tasks:
            kind, told = kinds[entry.arm], entry.parameters
            density = 1.0 if kind == "dense" else 1 - told["sparsity"]
            work = 2 * told["side"] ** 2 * told["batch"] * density
            reached[kind].append(1e-9 * work / (entry.median or math.inf))
    dense, single, blocks = (f"{min(s):.0f} to {max(s):.0f}" for s in reached.values())
    assert f"two threads reach {single} at 90 %, dense products {dense} (" in WORDS
    assert f"several times and reach {blocks}." in WORDS


def test_figures_of_masks_are_those_measured() -> None:
    results = reading.load(RESULTS)
    copies, touched = (
        results.ratio("refresh", "16.8 M entries", "call", ["masks 1×1"], [copy]) or 0.0
        for copy in ("copy", "copy into place")
    )
    assert f"take as long as {copies:.1f} copies of the tensor, or {touched:.1f} into" in WORDS


def test_figures_of_choices_are_those_measured() -> None:
    results = reading.load(RESULTS)
    cases = results.cases("choices")
    slower, apart = (
        [results.ratio("choices", case, "step", [over], [arm]) or 0.0 for case in cases]
        for over, arm in (("dense", "auto"), ("auto", "numba"))
    )
    assert len(cases) == 16
    assert f"is {min(slower):.1f} to {max(slower):.1f} times slower" in WORDS
    assert f"differ by up to {100 * (max(apart) - 1):.0f} %" in WORDS


@pytest.mark.parametrize("case", choices.cases(full=True), ids=lambda case: case.name)
def test_auto_takes_numba_in_every_case_of_the_choices(case: Case) -> None:
    parameters = next(arm.parameters for arm in case.arms if arm.name == "auto")
    problem = networks.problem(parameters["network"], parameters["batch"])
    config = arms.config_of(problem, parameters)
    state = tk.init_state(problem.model, config, tk.sgd(0.1))
    chosen = tk.explain(state, math.prod(problem.inputs.shape[:-1]))
    assert {chosen[name].engine for name in state.weights.layers()} == {"numba"}


@pytest.mark.parametrize("task", PLANS)
def test_tables_of_evidence_are_those_measured(task: str) -> None:
    runs, tuned = report.load(RESULTS, task)
    assert report.table(runs, tuned) in README
    assert not PLANS[task].ablations or report.ablation_table(runs, tuned) in README


def test_figures_of_refreshing_the_text_are_those_measured() -> None:
    runs, tuned = report.load(RESULTS, "text")
    images = report.load(RESULTS, "mlp")[1]["topkast"]
    plain = replace(tuned["topkast"], lr=1e-3, penalty_weight=0.0)
    held_out = replace(plain, seed=TUNING_SEED, validate=True, steps=0.25)
    carried = tuned | {"topkast": replace(images, task="text")}
    row = re.search(r"\| topkast \| (.+?) \(", report.table(runs, carried))
    assert row
    trials = [report.score(runs, replace(held_out, refresh_every=n)) for n in (1, 10, 100)]
    assert f"with what was chosen on images it reaches {row.group(1)} bits" in WORDS
    higher = report.score(runs, replace(held_out, refresh_every=1, lr=3e-3))
    told = "gives {:.2f}, {:.2f} and {:.2f} bits, and every step at 3·10⁻³ {:.2f}."
    assert told.format(*trials, higher) in WORDS
    chosen = replace(images, task="text", forward=0.8, backward=0.5)
    others = (
        replace(chosen, refresh_every=1),
        replace(chosen, penalty_weight=0.0),
        replace(chosen, backward=0.8),
    )
    for other in others:
        scores = [report.score(runs, replace(other, seed=seed)) for seed in (0, 1)]
        assert report.mean_and_spread(scores) in WORDS


def test_figures_of_the_other_learning_rate_of_set_are_those_measured() -> None:
    runs, tuned = report.load(RESULTS, "mlp")
    other = replace(tuned["set"], lr=3e-3)
    found = report.scores(runs, other).values()
    reached = ", ".join(map(report.mean_and_spread, found))
    assert f"the other gives {reached}" in WORDS
