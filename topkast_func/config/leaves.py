"""Whether the leaves of a parameter tree can be trained."""

from torch import Tensor
from torch.nn.parameter import is_lazy

from topkast_func.checks import dispatches
from topkast_func.trees import check_named, check_strided, check_tensor, check_text
from topkast_func.types import Params


def check_params(params: Params) -> None:
    """Check that every leaf is a plain floating-point or complex tensor with at least one entry.

    Args:
        params: The parameter tree.

    Raises:
        TypeError: The tree is not a mapping, or a leaf is no strided tensor of floating-point
            or complex numbers, one of 8 bits, or one that computes in a way of its own.
        ValueError: A leaf is empty, or has no values, or a name cannot be written to files.
    """
    check_named("params", params)
    check_text("params", params)
    for name, leaf in params.items():
        what = f"params[{name!r}]"
        check_shaped(what, check_tensor(what, leaf))
        check_leaf(what, leaf)
        if dispatches(leaf):
            raise TypeError(
                f"{what} is a {type(leaf).__name__}, which computes in a way of its own: give "
                "plain tensors"
            )


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
    """
    check_shaped(repr(name), tensor)
    if tensor.is_meta:
        raise ValueError(
            f"{name!r} is on the meta device, without values: move the module by "
            "to_empty(device=...), and load or initialise it, before; or, for init_state, pass "
            "materialize, which does so for one tensor at a time"
        )
