"""Trees by name: that they are such, and that their leaves fit what they go with."""

from collections.abc import Container, Iterable, Mapping, Sequence

from topkast_func.leaves import check_leaf, check_mask, check_plain, check_shaped, check_tensor
from topkast_func.powerprop import check_theta
from topkast_func.types import Masks, Params


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


def check_params(params: Params) -> None:
    """Check that every leaf is a plain floating-point or complex tensor with at least one entry.

    Args:
        params: The parameter tree.

    Raises:
        TypeError: The tree is not a mapping, or a leaf is no strided tensor of floating-point
            or complex numbers, one of 8 bits, or one that computes in a way of its own.
        ValueError: A leaf is empty, or has no values, or is φ of a module, or a name cannot be
            written to files.
    """
    check_named("params", params)
    check_theta(params)
    check_text("params", params)
    for name, leaf in params.items():
        what = f"params[{name!r}]"
        check_shaped(what, check_tensor(what, leaf))
        check_leaf(what, leaf)
        check_plain(what, leaf)


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
