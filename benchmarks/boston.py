"""Train the main job with several seeds and record what it reaches: ``make results``."""

import json
import platform
import statistics
from datetime import date
from pathlib import Path

import torch

from topkast_func.config import TopKastConfig
from topkast_func.demo import METHOD, train
from topkast_func.report.plots import sets
from topkast_func.training.state import masks_of

HERE = Path(__file__).parent
SEEDS, SPLITS = range(42, 47), range(5)
SPARSITIES = {"sparse": (0.7, 0.5), "dense": (0.0, 0.0)}


def main() -> None:
    """Write ``results/boston.json`` and the picture of the README."""
    runs = {
        name: [train("boston", _config(*pair), 200, seed, f"{name} {seed}") for seed in SEEDS]
        for name, pair in SPARSITIES.items()
    }
    splits = {
        name: [train("boston", _config(*pair), 200, 42, f"{name}, split {s}", s) for s in SPLITS]
        for name, pair in SPARSITIES.items()
    }
    results = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seeds": list(SEEDS),
        "splits": list(SPLITS),
        "split_test_mse": {name: [r.test_mse for r in several] for name, several in splits.items()},
        "mean_mse": runs["sparse"][0].mean_mse,
        "test_mse": {name: [run.test_mse for run in several] for name, several in runs.items()},
        "median_test_mse": {
            name: statistics.median(run.test_mse for run in several)
            for name, several in runs.items()
        },
    }
    (HERE / "results" / "boston.json").write_text(json.dumps(results, indent=2) + "\n")
    masks = masks_of(runs["sparse"][0].state)["0.weight"]
    title = "First layer of the Boston network, after training"
    sets(masks, title).savefig(HERE / "figures" / "sets.png", dpi=120)


def _config(forward_sparsity: float, backward_sparsity: float) -> TopKastConfig:
    return TopKastConfig(
        forward_sparsity, backward_sparsity, refresh_every=10, penalty_weight=0.1, method=METHOD
    )


if __name__ == "__main__":
    main()
