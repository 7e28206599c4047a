"""Products of sparse layers, behind one small interface."""

from topkast_func.kernels.costs import Layer
from topkast_func.kernels.engines import ENGINES, Choice, EngineName, choose, engine
from topkast_func.kernels.linear import sparse_linear
from topkast_func.kernels.pattern import BlockRows, Pattern, pattern_of

__all__ = [
    "ENGINES",
    "BlockRows",
    "Choice",
    "EngineName",
    "Layer",
    "Pattern",
    "choose",
    "engine",
    "pattern_of",
    "sparse_linear",
]
