"""Whether a state is one at all: that its parts have the names, shapes and dtypes of each other.

What it is a state of is for `agreement` to ask.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import floordiv, mod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from topkast_func.kernels.pattern import BlockRows, Pattern, block_of, is_indexed
from topkast_func.leaves import check_leaf, check_plain, check_strided
from topkast_func.reading import readable
from topkast_func.storage.compact import CompactWeights
from topkast_func.storage.dense import DenseWeights
from topkast_func.storage.index import Index, tensors_of
from topkast_func.storage.sound import is_sound
from topkast_func.storage.weights import Weights
from topkast_func.training.forms import AS_MADE, check_form
from topkast_func.trees import check_mask_pair, check_named, check_text
from topkast_func.types import Params

if TYPE_CHECKING:
    from topkast_func.training.state import TrainState

BROKEN = f"state is not whole: {{}}: {AS_MADE}"


def tree_problem(
    called: Callable[[str, str], str],
    theta: Params,
    sparse: Iterable[str],
    fixed: Mapping[str, Iterable[str]],
    exponents: Params,
    narrow: Params,
    others: Mapping[str, Iterable[str]],
) -> str | None:
    """Say where the trees of a state, in a file or not, do not go together.

    Args:
        called: What a tensor is called in the error, from its tree and its name.
        theta: θ by name, of which the shape and dtype are read.
        sparse: Names of the sparse parameters.
        fixed: Names of the trees of what is not trained.
        exponents: Exponents of powerpropagation by name.
        narrow: Empty tensors of the dtypes of the forward pass by name.
        others: Names of the trees of what is trained, as they are called in the error.

    Returns:
        The first thing that is wrong, or None.
    """
    for tree, names in {**others, "exponents": exponents, "narrow": narrow}.items():
        if unknown := [name for name in names if name not in theta]:
            return f"{tree} has {unknown}, which are no such parameters"
    if unreal := [name for name in sparse if theta[name].is_complex()]:
        return f"theta of {unreal} is complex and sparse"
    met = dict.fromkeys(theta, "trained")
    for tree, names in fixed.items():
        if both := sorted(met.keys() & {*names}):
            return f"{both} are both {tree} and {met[both[0]]}"
        met |= dict.fromkeys(names, tree)
    for name, exponent in exponents.items():
        if exponent.dtype != torch.float64 or exponent.ndim or not _exceeds_one(exponent):
            return f"{called('exponents', name)} is not a float64 number above 1"
    for name, like in narrow.items():
        if like.numel() or not _is_wider(theta[name].dtype, like.dtype):
            return f"{called('narrow', name)} is no empty tensor of a narrower dtype than theta"
    return None


def check_whole(state: "TrainState") -> None:
    """Check that the parts of a state go together.

    Args:
        state: The state, of which `check_form` is content.

    Raises:
        TypeError: A part of it is of another type.
        ValueError: A part lacks what others have, is of another shape or dtype, or has no values.
    """
    weights, frozen, buffers, split = state.weights, state.frozen, state.buffers, state.split
    slots = {f"optimizer.slots[{kind!r}]": tree for kind, tree in state.optimizer.slots.items()}
    trees = {"weights.values": weights.values, "weights.theta": weights.theta, **slots}
    trees |= {"frozen": frozen, "buffers": buffers}
    trees |= {"exponents": state.exponents, "narrow": state.narrow}
    check_named("state.optimizer.slots", state.optimizer.slots)
    check_text("state.optimizer.slots", state.optimizer.slots)
    for tree, tensors in trees.items():
        check_named(f"state.{tree}", tensors)
        check_text(f"state.{tree}", tensors)
        for name, tensor in tensors.items():
            check_strided(f"state.{tree}[{name!r}]", tensor)
            check_plain(f"state.{tree}[{name!r}]", tensor)
    for name, part in split.items():
        check_form(f"state.split[{name!r}]", part)
    for tree in ("weights.values", "frozen", "buffers", "exponents"):
        if absent := [name for name, tensor in trees[tree].items() if tensor.is_meta]:
            raise ValueError(BROKEN.format(f"{tree} of {absent} is on the meta device"))
    problem = _weights_problem(weights) or tree_problem(
        "{}[{!r}]".format,
        weights.values,
        weights.sparse_names,
        {"frozen": frozen, "buffers": buffers},
        state.exponents,
        state.narrow,
        {**slots, "split": split},
    )
    if problem := problem or _split_problem(state):
        raise ValueError(BROKEN.format(problem))


def _weights_problem(weights: Weights) -> str | None:
    values, theta, sparse = weights.values, weights.theta, weights.sparse_names
    if not values:
        return "weights has no values"
    for name, tensor in {**values, **theta}.items():
        check_leaf(f"state.weights.theta[{name!r}]", tensor)
    if isinstance(weights, DenseWeights):
        if unknown := [name for name in sparse if name not in theta]:
            return f"weights.sets has {unknown}, which are no such parameters"
        for name, masks in weights.sets.items():
            what = f"weights.sets[{name!r}]"
            check_mask_pair(f"state.{what}", masks, theta[name].shape)
            if {mask.device for mask in masks} != {theta[name].device}:
                return f"{what} is on another device than theta, {theta[name].device}"
            if not is_sound(masks, (1, 1), theta[name].shape):
                return f"A of {what} is not within B"
    if isinstance(weights, CompactWeights):
        found = [*weights.patterns, *weights.positions]
        if sorted(found) != sorted(sparse) or not {*sparse} <= values.keys():
            return (
                f"weights has theta of {sorted(sparse)}, patterns and positions of "
                f"{sorted(found)}, and values of {sorted(values)}"
            )
        for name in sparse:
            what, index = f"weights.values[{name!r}]", weights.sets(name)
            if theta[name].dtype != values[name].dtype:
                return f"{what} is of {values[name].dtype}, theta of {theta[name].dtype}"
            kept = "patterns" if isinstance(index, Pattern) else "positions"
            check_form(f"state.weights.{kept}[{name!r}]", index)
            if not _is_index(index, values[name], theta[name].shape):
                return (
                    f"{what} of shape {tuple(values[name].shape)} is not what its index tells of "
                    f"theta, of shape {tuple(theta[name].shape)}, on the same device"
                )
            if not is_sound(index, block_of(values[name]), theta[name].shape):
                return f"the numbers in weights.{kept}[{name!r}] are no places of A and B∖A"
    return None


def _is_index(index: Index, values: Tensor, shape: torch.Size) -> bool:
    """Return whether an index has the shapes and dtypes of one of values."""
    count, like = index.active_count + index.exploring_count, (1, values.device)
    if not isinstance(index, Pattern):
        kinds = {(part.dtype, part.ndim, part.device) for part in index}
        return kinds == {(torch.int64, *like)} and values.shape == (count,)
    block = block_of(values)
    if values.ndim not in (1, 3) or len(values) != count or len(shape) < 2:
        return False
    sides = shape[0], shape.numel() // shape[0]
    if not is_indexed(shape, block) or 0 in block or any(map(mod, sides, block)):
        return False
    height, width = map(floordiv, sides, block)
    forward, exploring, transposed, places = index
    kinds = {(part.dtype, part.ndim, part.device) for part in tensors_of(index)}
    return (
        kinds == {(torch.int32, *like)}
        and forward.columns.shape == transposed.columns.shape == places.shape
        and all(map(_is_of_rows, (forward, exploring, transposed), (height, height, width)))
    )


def _is_of_rows(part: BlockRows, count: int) -> bool:
    return len(part.pointers) > 1 and not (len(part.pointers) - 1) % count


def _split_problem(state: "TrainState") -> str | None:
    kinds = state.optimizer.slots
    for name, part in state.split.items():
        what = f"split[{name!r}]"
        if (part.place.dtype, part.place.shape) != (torch.int64, (2,)) or part.theta.ndim != 1:
            return f"{what} is no range that a rank has"
        if unknown := [kind for kind in part.slots if name not in kinds.get(kind, ())]:
            return f"{what}.slots has {unknown}, which are no such slots"
    return None


def is_inferred(state: "TrainState") -> bool:
    """Return whether what a step reads is of inference mode, and so nothing that autograd takes."""
    weights = state.weights
    trees = weights.values.values(), state.frozen.values(), state.buffers.values()
    return any(map(Tensor.is_inference, chain([state.step], weights.set_tensors, *trees)))


def _exceeds_one(exponent: Tensor) -> bool:
    return not readable(exponent) or bool(exponent > 1)


def _is_wider(one: torch.dtype, other: torch.dtype) -> bool:
    """Return whether one dtype holds what another of its kind does, and more."""
    same_kind = one.is_complex == other.is_complex and (other.is_complex or other.is_floating_point)
    return same_kind and one != other and torch.promote_types(one, other) == one
