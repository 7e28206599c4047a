"""Command line: ``python -m topkast_func boston`` or ``synthetic``."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from topkast_func import plots
from topkast_func.checks import check_count
from topkast_func.config import TopKastConfig
from topkast_func.demo import BATCH_SIZE, JOBS, METHOD, Run, train
from topkast_func.distributed.launched import is_first, launched
from topkast_func.report.summary import summary
from topkast_func.training.checkpoint import save


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a small regression network sparsely and report it beside its dense twin.

    Args:
        arguments: Words of the command line; None takes the process's own.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        config = TopKastConfig(
            forward_sparsity=options.forward_sparsity,
            backward_sparsity=options.backward_sparsity,
            refresh_every=options.refresh_every,
            penalty_weight=options.penalty_weight,
            method=METHOD,
        )
        check_count("epochs", options.epochs, 1)
        check_count("seed", options.seed, 0)
    except ValueError as problem:
        parser.error(str(problem))
    out = options.out or Path("runs") / options.job
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"--out: {problem}")
    runs = {"sparse": train(options.job, config, options.epochs, options.seed, "sparse")}
    if options.dense_twin:
        dense = replace(config, forward_sparsity=0.0, backward_sparsity=0.0)
        runs["dense"] = train(options.job, dense, options.epochs, options.seed, "dense twin")
    if not is_first():
        return
    _write(out, runs, vars(options), config)
    _report(Console(), runs)
    print(f"wrote loss.png, metrics.json and state.safetensors to {out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m topkast_func",
        description=main.__doc__.splitlines()[0] if main.__doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("job", choices=sorted(JOBS), help="the data to train on")
    parser.add_argument("--seed", type=int, default=42, help="of weights and batches")
    parser.add_argument("--epochs", type=int, default=200, help="passes over the data")
    parser.add_argument("--forward-sparsity", type=float, default=0.7, help="1 - D, in [0, 1)")
    parser.add_argument("--backward-sparsity", type=float, default=0.5, help="1 - (D + M)")
    parser.add_argument("--refresh-every", type=int, default=10, help="steps between refreshes")
    parser.add_argument("--penalty-weight", type=float, default=0.1, help="at least 0")
    parser.add_argument(
        "--dense-twin",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train the same network at sparsity 0 too, with the same penalty",
    )
    parser.add_argument("--out", type=Path, help="folder for the results; runs/JOB if not given")
    return parser


def _write(out: Path, runs: dict[str, Run], options: dict[str, Any], config: TopKastConfig) -> None:
    sparse = runs["sparse"]
    plots.losses(sparse.train_losses, sparse.validation_losses).savefig(out / "loss.png")
    save(sparse.state, out / "state.safetensors", config)
    metrics = {
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in options.items()},
        "test_mse": {
            **{name: _finite(run.test_mse) for name, run in runs.items()},
            "mean": sparse.mean_mse,
        },
        "seconds": {name: run.seconds for name, run in runs.items()},
        "best_epoch": {name: run.best_epoch for name, run in runs.items()},
        "layers": [row._asdict() for row in summary(sparse.state, BATCH_SIZE).rows],
        "train_losses": [_finite(loss) for loss in sparse.train_losses],
        "validation_losses": [_finite(loss) for loss in sparse.validation_losses],
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


def _finite(number: float) -> float | None:
    """Return a number as JSON can hold it: null for infinity and NaN."""
    return number if math.isfinite(number) else None


def _report(console: Console, runs: dict[str, Run]) -> None:
    console.print(summary(runs["sparse"].state, BATCH_SIZE))
    errors = Table("network", "test MSE", "seconds")
    for name, run in runs.items():
        errors.add_row(name, f"{run.test_mse:.4g}", f"{run.seconds:.1f}")
    errors.add_row("predicting the mean", f"{runs['sparse'].mean_mse:.4g}", "")
    console.print(errors)


if __name__ == "__main__":
    with launched():
        main()
