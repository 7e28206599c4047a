"""Layers, a loss and a trainer that keep their own state: the seed's classes and their siblings."""

from topkast_func.facade.densify import densify
from topkast_func.facade.layers import (
    TopKastConv1d,
    TopKastConv2d,
    TopKastConv3d,
    TopKastEmbedding,
    TopKastLinear,
)
from topkast_func.facade.loss import TopKastLoss
from topkast_func.facade.sparsifier import Sparsifier
from topkast_func.facade.sparsify import sparsify
from topkast_func.facade.trainer import TopKastTrainer

__all__ = [
    "Sparsifier",
    "TopKastConv1d",
    "TopKastConv2d",
    "TopKastConv3d",
    "TopKastEmbedding",
    "TopKastLinear",
    "TopKastLoss",
    "TopKastTrainer",
    "densify",
    "sparsify",
]
