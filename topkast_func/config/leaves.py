"""Whether the leaves of a parameter tree can be trained."""

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from topkast_func.checks import check_tree, dispatches
from topkast_func.types import Params


def check_params(params: Params) -> None:
    """Check that every leaf is a plain floating-point or complex tensor with at least one entry.

    Args:
        params: The parameter tree.

    Raises:
        TypeError: The tree is not a mapping, or a leaf is no strided tensor of floating-point
            or complex numbers, one of 8 bits, or one that computes in a way of its own.
        ValueError: A leaf is empty, or has no values.
    """
    check_tree(params)
    for name, leaf in params.items():
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"params[{name!r}] must be a tensor, got {type(leaf).__name__}; a nested tree "
                "is flattened to names with dots first"
            )
        check_shaped(name, leaf)
        if leaf.layout != torch.strided or leaf.is_nested:
            kind = "nested" if leaf.is_nested else leaf.layout
            raise TypeError(
                f"params[{name!r}] has layout {kind}: give dense tensors; which of their entries "
                "are stored is for masks to say"
            )
        if dispatches(leaf):
            raise TypeError(
                f"params[{name!r}] is a {type(leaf).__name__}, which computes in a way of its own: "
                "give plain tensors"
            )
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(
                f"params[{name!r}] must have a floating-point dtype, got {leaf.dtype}; buffers do "
                "not belong among parameters"
            )
        if leaf.itemsize == 1:
            raise TypeError(
                f"params[{name!r}] is {leaf.dtype}, in which torch does not compute: train in "
                "float16 or wider, and convert what inference is to read"
            )
        if leaf.numel() == 0:
            raise ValueError(f"params[{name!r}] is empty: its shape is {tuple(leaf.shape)}")


def check_shaped(name: str, tensor: Tensor) -> None:
    """Check that a tensor has a shape.

    Args:
        name: What it is called in the error.
        tensor: The tensor.

    Raises:
        ValueError: It is of a lazy module that has not run yet.
    """
    if is_lazy(tensor):
        raise ValueError(f"{name!r} has no shape yet: run the module once before")


def check_present(name: str, tensor: Tensor) -> None:
    """Check that a tensor has a shape and values.

    Args:
        name: What it is called in the error.
        tensor: The tensor.

    Raises:
        ValueError: It is on the meta device, or of a lazy module that has not run yet.
    """
    check_shaped(name, tensor)
    if tensor.is_meta:
        raise ValueError(
            f"{name!r} is on the meta device, without values: move the module by "
            "to_empty(device=...), and load or initialise it, before; or, for init_state, pass "
            "materialize, which does so for one tensor at a time"
        )
