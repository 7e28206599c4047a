"""Trees by name: that they are such, and that their leaves fit what they go with."""

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from topkast_func.types import Masks


def check_named(what: str, tree: object, leaves: str = "tensors") -> None:
    """Check that something is given by name.

    Args:
        what: What the tree is called in the error.
        tree: The tree.
        leaves: What it must map names to, for the error.

    Raises:
        TypeError: It is no mapping, or a name is no text.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"{what} must map names to {leaves}, got {type(tree).__name__}")
    if unnamed := [name for name in tree if not isinstance(name, str)]:
        raise TypeError(f"{what} must map names to {leaves}, got the names {unnamed}")


def check_text(what: str, names: Iterable[str]) -> None:
    """Check that names can be written to files.

    Args:
        what: What has the names, for the error.
        names: The names.

    Raises:
        ValueError: One holds half a character, a surrogate, of which UTF-8 has no bytes.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{what}: no file holds the name {name!a}, which UTF-8 cannot write: rename it"
            ) from None


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


def check_mask_pair(what: str, sets: object, shape: Sequence[int] | None = None) -> None:
    """Check that something is the sets of one weight.

    Args:
        what: What it is called in the error.
        sets: The sets.
        shape: Shape of the weight; None where it is not known.

    Raises:
        TypeError: They are not `Masks` of dense tensors of bool.
        ValueError: They have another shape.
    """
    if not isinstance(sets, Masks):
        raise TypeError(f"{what} must be Masks, got {type(sets).__name__}")
    for mask in sets:
        check_mask(what, mask, shape)
        shape = mask.shape


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


def check_known(what: str, tree: Iterable[str], names: Container[str]) -> None:
    """Check that a tree is of parameters that there are.

    Args:
        what: What it is called in the error.
        tree: Its names.
        names: Those of the parameters.

    Raises:
        ValueError: It is of others too.
    """
    if unknown := [name for name in tree if name not in names]:
        raise ValueError(f"{what} of unknown parameters: {unknown}")


def difference(what: str, found: Iterable[str], expected: Iterable[str]) -> str | None:
    """Say which names are missing and which unknown.

    Args:
        what: What they name.
        found: The names that there are.
        expected: Those that there should be.

    Returns:
        The words, or None where they are the same.
    """
    if {*found} == {*expected}:
        return None
    missing, unknown = {*expected} - {*found}, {*found} - {*expected}
    return f"of the {what} missing {sorted(missing)}, unknown {sorted(unknown)}"
