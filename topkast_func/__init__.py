"""Top-K Always Sparse Training (Top-KAST) as pure functions over PyTorch tensors."""

from topkast_func.checkpoint import load, save
from topkast_func.config import TopKastConfig
from topkast_func.explain import explain
from topkast_func.export import to_sparse
from topkast_func.facade import TopKastLinear, TopKastLoss, TopKastTrainer
from topkast_func.forward import index_masks, sparse_forward
from topkast_func.loss import exploration_penalty, penalized_loss
from topkast_func.masks import Masks, compute_masks
from topkast_func.optim import Optimizer, OptimizerState, adam, adamw, sgd
from topkast_func.state import (
    TrainState,
    dense_params,
    forward_params,
    init_state,
    masks_of,
    refresh,
)
from topkast_func.training import StepMetrics, make_train_step

__all__ = [
    "Masks",
    "Optimizer",
    "OptimizerState",
    "StepMetrics",
    "TopKastConfig",
    "TopKastLinear",
    "TopKastLoss",
    "TopKastTrainer",
    "TrainState",
    "adam",
    "adamw",
    "compute_masks",
    "dense_params",
    "explain",
    "exploration_penalty",
    "forward_params",
    "index_masks",
    "init_state",
    "load",
    "make_train_step",
    "masks_of",
    "penalized_loss",
    "refresh",
    "save",
    "sgd",
    "sparse_forward",
    "to_sparse",
]
