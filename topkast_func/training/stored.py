"""The parts of a state, found among the tensors of a file, with every rule that they keep."""

import math
from collections.abc import Collection, Iterable, Mapping
from reprlib import repr as short
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor

from topkast_func.files.layout import is_shape
from topkast_func.files.packing import unpacked_sets
from topkast_func.training.whole import tree_problem
from topkast_func.types import Masks, Tensors

COUNTERS = ("step", "seed", "mask_seed", "optimizer_step")
TREES = ("theta", "backward", "forward", "buffers", "frozen", "exponents", "narrow")


class StoredState(NamedTuple):
    """What a file holds, checked, on the CPU.

    Attributes:
        counters: Step, the two seeds and the step of the optimiser.
        theta: θ, or φ where it has an exponent, by name.
        masks: Sets of the sparse parameters.
        buffers: Buffers.
        frozen: Parameters that require no gradient.
        exponents: Exponents of powerpropagation.
        narrow: Empty tensors of the dtypes of the forward pass, where θ has wider ones.
        slots: Slots of the optimiser by kind.
        values: Shapes of the values of the sparse parameters; None in dense storage.
        layers: Names of the weights that kernels compute.
    """

    counters: Tensors
    theta: Tensors
    masks: dict[str, Masks]
    buffers: Tensors
    frozen: Tensors
    exponents: Tensors
    narrow: Tensors
    slots: dict[str, Tensors]
    values: dict[str, list[int]] | None
    layers: list[str]


def stored(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StoredState:
    """Find the parts of a state in a file.

    Args:
        header: What `flattened` returned, or what a hostile file has in its place.
        tensors: The tensors.

    Returns:
        The parts.

    Raises:
        ValueError: They are not those of a state.
    """
    slots = {kind: slots_tree(kind) for kind in _names(header, "slots")}
    rest = dict(tensors)
    counters = {name: _counter(name, rest.pop(name, None)) for name in COUNTERS}
    trees = {tree: _taken(rest, tree) for tree in (*TREES, *slots.values())}
    if rest:
        raise ValueError(f"no state has a tensor {next(iter(rest))}")
    theta = trees["theta"]
    _check_theta(theta)
    if problem := tree_problem(
        "{}/{}".format,
        theta,
        trees["backward"],
        {tree: trees[tree] for tree in ("frozen", "buffers")},
        trees["exponents"],
        trees["narrow"],
        {tree: trees[tree] for tree in ("backward", *slots.values())},
    ):
        raise ValueError(problem)
    masks = _masks(trees)
    layers = _names(header, "layers")
    _check_known("layers", layers, {name for name in masks if theta[name].ndim >= 2})
    return StoredState(
        counters,
        theta,
        masks,
        trees["buffers"],
        trees["frozen"],
        trees["exponents"],
        trees["narrow"],
        {kind: trees[tree] for kind, tree in slots.items()},
        _values(header, theta, masks),
        layers,
    )


def slots_tree(kind: str) -> str:
    """Return the name of the tree of a kind of slots."""
    return f"slots/{quote(kind, safe='')}"


def check_numbers(theta: Tensors) -> None:
    """Check that no weight holds NaN.

    Args:
        theta: θ by name.

    Raises:
        ValueError: One does.
    """
    for name, weight in theta.items():
        if weight.isnan().any():
            raise ValueError(f"theta/{name} holds NaN")


def _taken(tensors: dict[str, Tensor], tree: str) -> Tensors:
    """Take the tensors of a tree out of those that are left."""
    prefix = f"{tree}/"
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _names(header: Mapping[str, Any], key: str) -> list[str]:
    names = header.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its {key} are {short(names)}, not a list of names")
    if len({*names}) != len(names):
        raise ValueError(f"its {key} {short(names)} name one twice")
    return names


def _counter(name: str, tensor: Tensor | None) -> Tensor:
    if tensor is None or tensor.dtype != torch.int64 or tensor.ndim or tensor < 0:
        found = tensor if tensor is None or tensor.ndim else tensor.item()
        raise ValueError(f"{name} is {short(found)}, not an int64 number of at least 0")
    return tensor


def _check_theta(theta: Tensors) -> None:
    if not theta:
        raise ValueError("it has no theta")
    for name, weight in theta.items():
        real = weight.is_floating_point() and weight.itemsize > 1
        if not (real or weight.is_complex()) or not weight.numel():
            raise ValueError(f"theta/{name} is {weight.dtype} of shape {tuple(weight.shape)}")
    check_numbers(theta)


def _check_known(what: str, names: Iterable[str], known: Collection[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{what} has {unknown}, which are no such parameters")


def _masks(trees: Mapping[str, Tensors]) -> dict[str, Masks]:
    theta, forward, backward = (trees[tree] for tree in ("theta", "forward", "backward"))
    if forward.keys() != backward.keys():
        raise ValueError(f"A is of {sorted(forward)}, B of {sorted(backward)}")
    return {
        name: unpacked_sets(name, Masks(forward[name], backward[name]), theta[name].shape)
        for name in backward
    }


def _values(
    header: Mapping[str, Any], theta: Tensors, masks: Mapping[str, Masks]
) -> dict[str, list[int]] | None:
    storage, values = header.get("storage"), header.get("values")
    if storage == "dense" and values is None:
        return None
    if storage != "compact" or not isinstance(values, dict) or values.keys() != masks.keys():
        raise ValueError(f"its storage is {short(storage)}, with values of {short(values)}")
    for name, shape in values.items():
        least, most = int(masks[name].backward.count_nonzero()), theta[name].numel()
        if not is_shape(shape) or len(shape) not in (1, 3) or not least <= math.prod(shape) <= most:
            raise ValueError(
                f"the values of {name!r} have shape {short(shape)}, of {least} to {most} entries"
            )
    return values
