"""Top-K Always Sparse Training (Top-KAST) as pure functions over PyTorch tensors."""

from importlib import import_module
from types import ModuleType

from topkast_func.allocation import allocate, first_weight, last_weight
from topkast_func.checkpoint import load, save
from topkast_func.config import TopKastConfig
from topkast_func.exchange import Exchange, exchanges, exploration_rate, explored
from topkast_func.explain import explain
from topkast_func.export import to_sparse
from topkast_func.facade import TopKastLinear, TopKastLoss, TopKastTrainer
from topkast_func.flops import TrainingFlops, training_flops
from topkast_func.forward import index_masks, sparse_forward
from topkast_func.loop import Callback, History, Refresh, train
from topkast_func.loss import exploration_penalty, penalized_loss
from topkast_func.masks import compute_masks
from topkast_func.methods import (
    Method,
    dense,
    gmp,
    random_backward,
    rigl,
    set,
    static,
    ste,
    topkast,
)
from topkast_func.optim import Optimizer, OptimizerState, adam, adamw, sgd
from topkast_func.sparsity import Allocation, Staged, cubic, staged
from topkast_func.state import (
    TrainState,
    dense_params,
    forward_params,
    init_state,
    masks_of,
    refresh,
)
from topkast_func.summary import Summary, summary
from topkast_func.tensorboard import TensorBoardLogger
from topkast_func.training import StepMetrics, dense_gradients, make_train_step
from topkast_func.types import Masks

__all__ = [
    "Allocation",
    "Callback",
    "Exchange",
    "History",
    "Masks",
    "Method",
    "Optimizer",
    "OptimizerState",
    "Refresh",
    "Staged",
    "StepMetrics",
    "Summary",
    "TensorBoardLogger",
    "TopKastConfig",
    "TopKastLinear",
    "TopKastLoss",
    "TopKastTrainer",
    "TrainState",
    "TrainingFlops",
    "adam",
    "adamw",
    "allocate",
    "compute_masks",
    "cubic",
    "dense",
    "dense_gradients",
    "dense_params",
    "exchanges",
    "explain",
    "exploration_penalty",
    "exploration_rate",
    "explored",
    "first_weight",
    "forward_params",
    "gmp",
    "index_masks",
    "init_state",
    "last_weight",
    "load",
    "make_train_step",
    "masks_of",
    "penalized_loss",
    "random_backward",
    "refresh",
    "rigl",
    "save",
    "set",
    "sgd",
    "sparse_forward",
    "staged",
    "static",
    "ste",
    "summary",
    "to_sparse",
    "topkast",
    "train",
    "training_flops",
]


def __getattr__(name: str) -> ModuleType:
    """Import `plots`, which needs matplotlib, and `testing`, which needs Hypothesis, when used."""
    if name in ("plots", "testing"):
        return import_module(f"topkast_func.{name}")
    raise AttributeError(f"module 'topkast_func' has no attribute {name!r}")
