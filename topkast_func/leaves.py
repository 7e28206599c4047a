"""Whether one tensor is a leaf that can be trained, or a mask."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from topkast_func.reading import check_numbers, dispatches


def check_tensor(what: str, leaf: object) -> Tensor:
    """Return a leaf if it is a tensor.

    Args:
        what: What it is called in the error.
        leaf: The leaf.

    Returns:
        The leaf.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(leaf, Tensor):
        raise TypeError(
            f"{what} must be a tensor, got {type(leaf).__name__}; a nested tree is flattened to "
            "names with dots first"
        )
    return leaf


def check_strided(what: str, leaf: Tensor, why: str = "") -> None:
    """Check that a tensor is neither sparse nor nested.

    Args:
        what: What it is called in the error.
        leaf: The tensor.
        why: What the error ends with.

    Raises:
        TypeError: It is one of them.
    """
    if leaf.layout != torch.strided or leaf.is_nested:
        layout = "nested" if leaf.is_nested else leaf.layout
        raise TypeError(f"{what} has layout {layout}: give dense tensors{why}")


def check_shape(
    what: str, leaf: Tensor, shape: Sequence[int], whose: str = "the parameter"
) -> None:
    """Check that a tensor has the shape of another.

    Args:
        what: What it is called in the error.
        leaf: The tensor.
        shape: The shape.
        whose: What has that shape, for the error.

    Raises:
        TypeError: It is nested.
        ValueError: It has another.
    """
    if leaf.is_nested:
        check_strided(what, leaf)
    if leaf.shape != torch.Size(shape):
        raise ValueError(f"{what} has shape {tuple(leaf.shape)}, {whose} {tuple(shape)}")


def check_mask(what: str, mask: object, shape: Sequence[int] | None = None) -> None:
    """Check that something is a mask.

    Args:
        what: What it is called in the error.
        mask: The mask.
        shape: Shape that it must have; None for any.

    Raises:
        TypeError: It is no dense tensor of bool.
        ValueError: It has another shape.
    """
    mask = check_tensor(what, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{what} must be of torch.bool, got {mask.dtype}")
    check_strided(what, mask)
    if shape is not None:
        check_shape(what, mask, shape)


def check_leaf(what: str, leaf: Tensor) -> None:
    """Check that a leaf is a dense tensor, with an entry, of numbers that can be trained.

    Args:
        what: What it is called in the error.
        leaf: The leaf.

    Raises:
        TypeError: It is no strided tensor of floating-point or complex numbers, or one of 8 bits.
        ValueError: It is empty.
    """
    check_tensor(what, leaf)
    check_strided(what, leaf, "; which of their entries are stored is for masks to say")
    if not (leaf.is_floating_point() or leaf.is_complex()):
        raise TypeError(
            f"{what} must have a floating-point dtype, got {leaf.dtype}; buffers do not belong "
            "among parameters"
        )
    if leaf.itemsize == 1:
        raise TypeError(
            f"{what} is {leaf.dtype}, in which torch does not compute: train in float16 or wider, "
            "and convert what inference is to read"
        )
    if leaf.numel() == 0:
        raise ValueError(f"{what} is empty: its shape is {tuple(leaf.shape)}")


def check_plain(what: str, leaf: Tensor) -> None:
    """Check that a tensor computes as tensors do.

    Args:
        what: What it is called in the error.
        leaf: The tensor.

    Raises:
        TypeError: It is of a class that computes in a way of its own.
    """
    if dispatches(leaf):
        raise TypeError(
            f"{what} is a {type(leaf).__name__}, which computes in a way of its own: give plain "
            "tensors"
        )


def check_shaped(what: str, tensor: Tensor) -> None:
    """Check that a tensor has a shape.

    Args:
        what: What it is called in the error.
        tensor: The tensor.

    Raises:
        ValueError: It is of a lazy module that has not run yet.
    """
    if is_lazy(tensor):
        raise ValueError(f"{what} has no shape yet: run the module once before")


def check_present(name: str, tensor: Tensor) -> None:
    """Check that a tensor has a shape and values.

    Args:
        name: What it is called in the error.
        tensor: The tensor.

    Raises:
        ValueError: It is on the meta device, or of a lazy module that has not run yet.
        RuntimeError: Nothing has values, under `FakeTensorMode`.
    """
    check_numbers(f"what takes {name!r}")
    check_shaped(repr(name), tensor)
    if tensor.is_meta:
        raise ValueError(
            f"{name!r} is on the meta device, without values: move the module by "
            "to_empty(device=...), and load or initialise it, before; or, for init_state, pass "
            "materialize, which does so for one tensor at a time"
        )
