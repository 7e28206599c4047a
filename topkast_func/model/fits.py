"""Whether parameters are those of a model, and sets theirs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from topkast_func.leaves import check_leaf, check_shape, check_tensor
from topkast_func.model.indexed import AnySets, Indexed
from topkast_func.model.modules import check_names, tensors_of
from topkast_func.powerprop import check_theta
from topkast_func.trees import check_known, check_mask_pair, check_named
from topkast_func.types import Masks, Model, Params


def check_sets(model: Model, params: Params, masks: Mapping[str, AnySets]) -> None:
    """Check that parameters are those of a model and masks those of the parameters.

    Args:
        model: A module or a pure function.
        params: θ by name.
        masks: Sets by name.

    Raises:
        TypeError: See `sparse_forward`.
        ValueError: See `sparse_forward`.
    """
    check_named("params", params)
    check_theta(params)
    check_names(model, params.keys())
    own = tensors_of(model)
    for name, leaf in params.items():
        check_tensor(f"params[{name!r}]", leaf)
        if name in own:
            check_shape(f"params[{name!r}]", leaf, own[name].shape, "the model")
    _check_masks(params, masks)


def check_sets_of(params: Params, masks: Mapping[str, AnySets]) -> None:
    """Check that parameters are tensors by name and masks theirs.

    Args:
        params: θ by name.
        masks: Sets by name.

    Raises:
        TypeError: See `sparse_forward`.
        ValueError: See `sparse_forward`.
    """
    check_named("params", params)
    check_theta(params)
    for name, leaf in params.items():
        check_tensor(f"params[{name!r}]", leaf)
    _check_masks(params, masks)


def _check_masks(params: Params, masks: Mapping[str, AnySets]) -> None:
    check_named("masks", masks, "Masks")
    check_known("masks", masks, params)
    for name, sets in masks.items():
        theta = params[name]
        check_leaf(f"params[{name!r}]", theta)
        _check_weight_sets(name, sets, theta.shape)
        held = sets.places if isinstance(sets, Indexed) else sets.forward
        if held.device != theta.device:
            raise ValueError(f"masks[{name!r}] are on {held.device}, the parameter {theta.device}")


def _check_weight_sets(name: str, sets: AnySets, shape: torch.Size) -> None:
    """Check the type and the shape of the sets of one weight.

    Args:
        name: Name of the weight, for errors.
        sets: Its sets.
        shape: Its shape.

    Raises:
        TypeError: The sets are neither `Masks` of bool nor indexed.
        ValueError: They have another shape.
    """
    if not isinstance(sets, (Masks, Indexed)):
        raise TypeError(
            f"masks[{name!r}] must be Masks, or what index_masks returns, got {type(sets).__name__}"
        )
    if isinstance(sets, Masks):
        check_mask_pair(f"masks[{name!r}]", sets, shape)
    elif sets.shape != tuple(shape):
        raise ValueError(f"masks[{name!r}] are indexed for shape {sets.shape}, not {tuple(shape)}")


def several_kinds(model: Model, params: Params) -> str | None:
    """Say which parameters differ in kind though a module has them in one, or the model is none."""
    own = tensors_of(model)
    first: dict[str, str] = {}
    for name, leaf in params.items():
        other = first.setdefault(_kind(own[name]) if name in own else "", name)
        if (kind := _kind(leaf)) != (before := _kind(params[other])):
            return f"params[{name!r}] is {kind}, and params[{other!r}] {before}"
    return None


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of {tensor.layout} on {tensor.device}"
