"""Top-K Always Sparse Training (Top-KAST) as pure functions over PyTorch tensors."""

from importlib import import_module
from types import ModuleType

from topkast_func.compiling import compilation_seconds
from topkast_func.config import TopKastConfig, allocate, first_weight, last_weight
from topkast_func.facade import (
    Sparsifier,
    TopKastConv1d,
    TopKastConv2d,
    TopKastConv3d,
    TopKastEmbedding,
    TopKastLinear,
    TopKastLoss,
    TopKastTrainer,
    densify,
    sparsify,
)
from topkast_func.files.weights import from_safetensors
from topkast_func.inference import SparseLinear, sparse_module
from topkast_func.integrations.tensorboard import TensorBoardLogger
from topkast_func.masks import compute_masks
from topkast_func.methods import (
    Method,
    Situation,
    dense,
    gmp,
    random_backward,
    rigl,
    set,
    static,
    ste,
    topkast,
)
from topkast_func.model.forward import sparse_forward
from topkast_func.model.indexed import index_masks
from topkast_func.report.exchange import Exchange, exchanges, exploration_rate, explored
from topkast_func.report.explain import explain
from topkast_func.report.export import to_sparse
from topkast_func.report.flops import TrainingFlops, training_flops
from topkast_func.report.history import History, Refresh
from topkast_func.report.plan import Layout, Plan, plan
from topkast_func.report.summary import Summary, summary
from topkast_func.sparsity import Allocation, Staged, cubic, staged
from topkast_func.training.best import Best
from topkast_func.training.checkpoint import load, load_config, save
from topkast_func.training.gather import gather
from topkast_func.training.gradients import dense_gradients
from topkast_func.training.loop import Callback, train
from topkast_func.training.loss import exploration_penalty, penalized_loss
from topkast_func.training.metrics import StepMetrics
from topkast_func.training.optim import (
    Optimizer,
    OptimizerState,
    Transformation,
    adam,
    adamw,
    chain,
    clip_by_global_norm,
    lion,
    multi_steps,
    partition,
    sgd,
)
from topkast_func.training.readout import dense_params, forward_params, masks_of
from topkast_func.training.refresh import refresh
from topkast_func.training.sharded import async_save_sharded, load_sharded, save_sharded
from topkast_func.training.start import init_state
from topkast_func.training.state import TrainState
from topkast_func.training.step import make_train_step
from topkast_func.types import Masks

__all__ = [
    "Allocation",
    "Best",
    "Callback",
    "Exchange",
    "History",
    "Layout",
    "Masks",
    "Method",
    "Optimizer",
    "OptimizerState",
    "Plan",
    "Refresh",
    "Situation",
    "SparseLinear",
    "Sparsifier",
    "Staged",
    "StepMetrics",
    "Summary",
    "TensorBoardLogger",
    "TopKastConfig",
    "TopKastConv1d",
    "TopKastConv2d",
    "TopKastConv3d",
    "TopKastEmbedding",
    "TopKastLinear",
    "TopKastLoss",
    "TopKastTrainer",
    "TrainState",
    "TrainingFlops",
    "Transformation",
    "adam",
    "adamw",
    "allocate",
    "async_save_sharded",
    "chain",
    "clip_by_global_norm",
    "compilation_seconds",
    "compute_masks",
    "cubic",
    "dense",
    "dense_gradients",
    "dense_params",
    "densify",
    "exchanges",
    "explain",
    "exploration_penalty",
    "exploration_rate",
    "explored",
    "first_weight",
    "forward_params",
    "from_safetensors",
    "gather",
    "gmp",
    "index_masks",
    "init_state",
    "last_weight",
    "lion",
    "load",
    "load_config",
    "load_sharded",
    "make_train_step",
    "masks_of",
    "multi_steps",
    "partition",
    "penalized_loss",
    "plan",
    "random_backward",
    "refresh",
    "rigl",
    "save",
    "save_sharded",
    "set",
    "sgd",
    "sparse_forward",
    "sparse_module",
    "sparsify",
    "staged",
    "static",
    "ste",
    "summary",
    "to_sparse",
    "topkast",
    "train",
    "training_flops",
]


__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """Import `plots`, which needs matplotlib, and `testing`, which needs Hypothesis, when used."""
    modules = {"plots": "topkast_func.report.plots", "testing": "topkast_func.testing"}
    if name in modules:
        return import_module(modules[name])
    raise AttributeError(f"module 'topkast_func' has no attribute {name!r}")
