"""Command line: ``python -m topkast_func boston`` or ``synthetic``, or ``topkast-func``."""

import argparse
import json
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import topkast_func as tk
from topkast_func.checks import check_count, check_number
from topkast_func.config import TopKastConfig
from topkast_func.demo import BATCH_SIZE, JOBS, LEARNING_RATE, METHODS, Error, Run, train
from topkast_func.distributed.launched import is_first, launched
from topkast_func.report.summary import summary
from topkast_func.report.table import paragraph, table
from topkast_func.training.checkpoint import save
from topkast_func.training.state import Storage

FILES = ("loss.png", "metrics.json", "state.safetensors")
INTERRUPTED = 130
"""What a shell returns where Ctrl-C ended a command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a small regression network sparsely and report it beside its dense twin.

    Args:
        arguments: Words of the command line; None takes the process's own.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    out = options.out = options.out or Path("runs") / options.job
    try:
        config = TopKastConfig(
            forward_sparsity=options.forward_sparsity,
            backward_sparsity=options.backward_sparsity,
            refresh_every=options.refresh_every,
            penalty_weight=options.penalty_weight,
            method=METHODS[options.method],
        )
        check_count("epochs", options.epochs, 1)
        check_count("seed", options.seed, 0)
        check_number("lr", options.lr, 0.0)
        out.mkdir(parents=True, exist_ok=True)
    except ValueError as problem:
        parser.error(str(problem))
    except OSError as problem:
        parser.error(f"--out: {problem}")
    if not options.overwrite and any((out / name).exists() for name in FILES):
        parser.error(f"{out} holds an earlier run: name another folder by --out, or --overwrite it")
    runs: dict[str, Run] = {}
    with _interrupted_once():
        with suppress(KeyboardInterrupt):
            _train(runs, options, config)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not is_first():
            return
        if runs:
            _report(runs, config)
            _write(out, runs, options, config)
    told = ", ".join(f"{name} {len(run.train_losses)}" for name, run in runs.items())
    print(f"wrote {', '.join(FILES if runs else ()) or 'nothing'} to {out}")
    whole = len(runs) == 1 + options.dense_twin
    if not whole or any(run.interrupted for run in runs.values()):
        done = f"of {options.epochs} epochs: {told or 'none'}"
        parser.exit(INTERRUPTED, f"interrupted; {done}\n")


@contextmanager
def _interrupted_once() -> Iterator[None]:
    """Let one Ctrl-C end the training, and none what comes of it and is written after it."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="topkast-func",
        description=main.__doc__.splitlines()[0] if main.__doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("job", choices=sorted(JOBS), help="the data to train on")
    parser.add_argument("--version", action="version", version=f"topkast_func {tk.__version__}")
    parser.add_argument("--method", choices=METHODS, default="topkast", help="who chooses the sets")
    parser.add_argument("--seed", type=int, default=42, help="of weights and batches")
    parser.add_argument("--epochs", type=int, default=200, help="passes over the data")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="learning rate")
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
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the step: it takes a while once, and less at each step",
    )
    parser.add_argument("--out", type=Path, help="folder for the results; runs/JOB if not given")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in it")
    return parser


def _train(runs: dict[str, Run], options: argparse.Namespace, config: TopKastConfig) -> None:
    """Add the run and that of its dense twin, as far as Ctrl-C lets them come."""
    twin = replace(config, forward_sparsity=0.0, backward_sparsity=0.0, method=METHODS["topkast"])
    storages: dict[str, Storage] = {"sparse": "compact", "dense": "dense"}
    for name, its in (("sparse", config), ("dense", twin))[: 1 + options.dense_twin]:
        runs[name] = train(
            options.job,
            its,
            options.epochs,
            options.seed,
            name,
            lr=options.lr,
            storage=storages[name],
            compile=options.compile,
        )
        if runs[name].interrupted:
            break


def _write(
    out: Path, runs: dict[str, Run], options: argparse.Namespace, config: TopKastConfig
) -> None:
    """Write the results."""
    sparse, dense = runs["sparse"], runs.get("dense")
    tk.plots.losses(
        sparse.train_losses,
        sparse.validation_losses,
        others={"dense, validation": dense.validation_losses} if dense else None,
        best=sparse.best_epoch,
        title=f"{options.job}, {options.method} at {config.forward_sparsity:.0%}: squared error",
    ).savefig(out / FILES[0])
    (out / FILES[1]).write_text(json.dumps(_metrics(runs, options, config), indent=2) + "\n")
    save(sparse.state, out / FILES[2], config)


def _metrics(
    runs: dict[str, Run], options: argparse.Namespace, config: TopKastConfig
) -> dict[str, Any]:
    sparse = runs["sparse"]
    told = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    metrics = {
        "options": told,
        "test_mse": {name: run.test.mean for name, run in runs.items()}
        | {"mean": sparse.mean.mean},
        "validation_mse": {name: run.validation.mean for name, run in runs.items()},
        "seconds": {name: run.times._asdict() for name, run in runs.items()},
        "best_epoch": {name: run.best_epoch for name, run in runs.items()},
        "interrupted": {name: run.interrupted for name, run in runs.items()},
        "layers": [row._asdict() for row in summary(sparse.state, BATCH_SIZE, config=config).rows],
        "train_losses": {name: run.train_losses for name, run in runs.items()},
        "validation_losses": {name: run.validation_losses for name, run in runs.items()},
    }
    finite: dict[str, Any] = _finite(metrics)
    return finite


def _finite(tree: Any) -> Any:
    """Return a tree as JSON can hold it: null for infinity and NaN."""
    if isinstance(tree, dict):
        return {name: _finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _report(runs: dict[str, Run], config: TopKastConfig) -> None:
    sparse = runs["sparse"]
    print(summary(sparse.state, BATCH_SIZE, model=sparse.model, config=config), end="\n\n")
    head = ("squared error", "validation", "test", "best epoch", "training", "compilation")
    rows = [
        (
            name,
            _shown(run.validation),
            _shown(run.test),
            "-" if run.best_epoch is None else str(run.best_epoch + 1),
            *(f"{seconds:.1f} s" for seconds in run.times),
        )
        for name, run in runs.items()
    ]
    print(table(head, [*rows, ("the mean", "", _shown(sparse.mean), "", "", "")]))
    _, validation, test = sparse.rows
    print(
        paragraph(
            f"± is the standard error over the rows of a part, {validation} and {test} that are "
            "other ones: validation and test differ by chance, by as much as that. The epoch is "
            "the best on validation; no choice has seen the test. Compilation is done once."
        )
    )


def _shown(error: Error) -> str:
    return f"{error.mean:.4g} ± {error.spread:.2g}"


if __name__ == "__main__":
    with launched():
        main()
