"""Methods of sparse training: values that a configuration carries."""

from topkast_func.methods.base import Entry, Method, Situation
from topkast_func.methods.exchange import rigl, set, static
from topkast_func.methods.magnitude import dense, gmp, random_backward, ste, topkast

__all__ = [
    "Entry",
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
