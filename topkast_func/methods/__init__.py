"""Methods of sparse training: values that a configuration carries."""

from topkast_func.methods.base import Method, Situation
from topkast_func.methods.dense import dense
from topkast_func.methods.gmp import gmp
from topkast_func.methods.random_backward import random_backward
from topkast_func.methods.rigl import rigl
from topkast_func.methods.set import set
from topkast_func.methods.static import static
from topkast_func.methods.ste import ste
from topkast_func.methods.topkast import topkast

__all__ = [
    "Method",
    "Situation",
    "dense",
    "gmp",
    "random_backward",
    "rigl",
    "set",
    "static",
    "ste",
    "topkast",
]
