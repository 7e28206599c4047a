"""Optimisers: pure functions from gradients to updates, and what they are put together from.

Knows nothing of states, sets or storages but the names and values that are updated.
"""

from topkast_func.training.optim.accumulation import multi_steps
from topkast_func.training.optim.chains import chain, clip_by_global_norm
from topkast_func.training.optim.descent import adam, adamw, lion, sgd
from topkast_func.training.optim.groups import partition
from topkast_func.training.optim.norms import global_norm, summed_by
from topkast_func.training.optim.rates import Rate
from topkast_func.training.optim.returned import check_slots, started, updated
from topkast_func.training.optim.transformation import (
    Optimizer,
    OptimizerState,
    Transformation,
    check_optimizer,
    slot_problem,
)

__all__ = [
    "Optimizer",
    "OptimizerState",
    "Rate",
    "Transformation",
    "adam",
    "adamw",
    "chain",
    "check_optimizer",
    "check_slots",
    "clip_by_global_norm",
    "global_norm",
    "lion",
    "multi_steps",
    "partition",
    "sgd",
    "slot_problem",
    "started",
    "summed_by",
    "updated",
]
