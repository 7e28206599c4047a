"""The seed's classes: a layer, a loss and a trainer that keep their own state."""

from topkast_func.facade.linear import TopKastLinear
from topkast_func.facade.loss import TopKastLoss
from topkast_func.facade.trainer import TopKastTrainer

__all__ = ["TopKastLinear", "TopKastLoss", "TopKastTrainer"]
