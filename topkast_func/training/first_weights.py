"""The weights of a state as it begins: all that have values at once, the others one by one."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from topkast_func.config import TopKastConfig
from topkast_func.config.allocation import allocate, given_sparsity
from topkast_func.masks import counts, counts_by, starting_masks
from topkast_func.model.layers import kernel_weights
from topkast_func.model.modules import trainable
from topkast_func.places import bands
from topkast_func.powerprop import check_moves, phi_of
from topkast_func.sparsity import Allocation
from topkast_func.storage.compact import compact
from topkast_func.storage.dense import dense_weights
from topkast_func.storage.weights import Weights
from topkast_func.training.fits_config import check_masks
from topkast_func.training.materialize import Source
from topkast_func.training.memory import LARGE, give_back
from topkast_func.training.state import Storage
from topkast_func.trees import check_params
from topkast_func.types import Masks, Params, Tensors


class Manner(NamedTuple):
    """How weights begin; see `init_state`.

    Attributes:
        config: The configuration.
        storage: "compact" or "dense".
        theta_device: Where θ rests; None for where it is.
        mask_seed: Seed of the methods that draw sets.
        masks: Sets of the caller's; None for those that the method chooses.
        master: The dtype that narrower weights are kept in; None for their own.
    """

    config: TopKastConfig
    storage: Storage
    theta_device: torch.device | str | None
    mask_seed: int
    masks: Mapping[str, Masks] | None
    master: torch.dtype | None


def first_weights(
    params: Params, layers: Collection[str], source: Source, manner: Manner
) -> tuple[Weights, list[str]]:
    """Choose the sets of weights, and store them.

    Args:
        params: Weights by name, on the meta device where they have no values yet.
        layers: Names of the sparse matrices that kernels are to compute.
        source: Where the values come from.
        manner: How they begin.

    Returns:
        The weights, and the names of those that are stored as φ of powerpropagation.

    Raises:
        TypeError: See `init_state`.
        ValueError: See `init_state`.
        NaNParameterError: See `init_state`; a ValueError too.
    """
    config = manner.config
    if manner.masks is not None:
        check_masks(params, manner.masks, config)
    allocations = allocate(params, config)
    sizes = counts_by({name: theta.shape for name, theta in params.items()}, allocations, config)
    powers = given_sparsity(params, config) if config.powerprop > 1.0 else []
    at_hand = [name for name, theta in params.items() if not theta.is_meta]
    apart = [[name] for name, theta in params.items() if theta.is_meta]
    parts = []
    for names in filter(None, (at_hand, *apart)):
        made = {name: source(name, params[name]) for name in names}
        parts.append(_stored(made, allocations, sizes, layers, powers, manner))
        if sum(params[name].nbytes for name in names) >= LARGE:
            give_back()
    return _joined(parts, list(params)), powers


def outlined_weights(
    model: nn.Module | Params,
    config: TopKastConfig,
    storage: Storage,
    master: torch.dtype | None = None,
) -> Weights:
    """Return what `first_weights` does without values: every tensor on the meta device.

    Args:
        model: A module, on any device, or weights by name.
        config: The configuration.
        storage: "compact" or "dense".
        master: See `init_state`.

    Returns:
        The weights, in the shapes and dtypes of those that training begins with.

    Raises:
        TypeError: See `init_state`.
        ValueError: There is nothing to train, or the configuration does not fit.
    """
    check_master(master)
    params, layers = trained(model)
    sizes = counts(params, config)
    outlines = {
        name: torch.empty_like(_plain(theta), dtype=_dtype(theta, master), device="meta")
        for name, theta in params.items()
    }
    sets = {n: Masks(*2 * [torch.empty_like(outlines[n], dtype=torch.bool)]) for n in sizes}
    if storage == "compact":
        return compact(outlines, sets, sizes, layers, config.block_shape)
    return dense_weights(outlines, sets)


def check_master(master: object) -> None:
    """Check that a dtype is one that θ can be kept in beside narrower weights.

    Args:
        master: The dtype, or None.

    Raises:
        TypeError: It is neither.
        ValueError: It is another dtype.
    """
    if master is None:
        return
    if not isinstance(master, torch.dtype):
        raise TypeError(f"master must be torch.float32, torch.float64 or None, got {master!r}")
    if master not in (torch.float32, torch.float64):
        raise ValueError(f"master must be torch.float32, torch.float64 or None, got {master}")


def trained(model: nn.Module | Params) -> tuple[Params, list[str]]:
    """Return the trained parameters of a model, and names of those that kernels could multiply by.

    Args:
        model: A module, or weights by name, of which every matrix is taken for one of a layer.

    Returns:
        The parameters, and names of some of them.

    Raises:
        TypeError: It is neither.
        ValueError: There are no parameters, or one goes by two names.
    """
    params = trainable(model) if isinstance(model, nn.Module) else model
    check_params(params)
    if not params:
        raise ValueError("there is no parameter that requires a gradient")
    if isinstance(model, nn.Module):
        return params, [*kernel_weights(model)]
    first: dict[int, str] = {}
    for name, theta in params.items():
        if (other := first.setdefault(id(theta), name)) != name:
            raise ValueError(
                f"{other!r} and {name!r} are one tensor, and would be trained as two: give it one "
                "name, and let the function read it under that"
            )
    return params, [name for name, theta in params.items() if theta.ndim == 2]


def _stored(
    params: Tensors,
    allocations: Mapping[str, Allocation],
    sizes: Mapping[str, tuple[int, int]],
    layers: Collection[str],
    powers: Collection[str],
    manner: Manner,
) -> Weights:
    raw = {name: _kept(theta, manner.master) for name, theta in params.items()}
    params.clear()  # what was made for the state goes first: to choose and index takes memory too
    sets, exponent = _sets(raw, allocations, manner), manner.config.powerprop
    for name in [name for name in powers if name in raw]:
        check_moves(name, raw[name], exponent)
        rows = raw[name].view(raw[name].shape or (1,))
        for band in bands(rows):
            rows[band] = phi_of(rows[band], exponent)
    if manner.storage == "compact":
        block, place = manner.config.block_shape, manner.theta_device
        return compact(raw, sets, sizes, layers, block, place)
    return dense_weights(raw, sets)


def _sets(
    params: Tensors, allocations: Mapping[str, Allocation], manner: Manner
) -> dict[str, Masks]:
    if manner.masks is None:
        return starting_masks(params, allocations, manner.config, seed=manner.mask_seed)
    return {
        name: Masks(*(mask.to(params[name].device, copy=True) for mask in masks))
        for name, masks in manner.masks.items()
        if name in params
    }


def _kept(theta: Tensor, master: torch.dtype | None) -> Tensor:
    """Return a copy of a weight as a plain tensor, in the dtype that it is kept in."""
    return _plain(theta).to(_dtype(theta, master), copy=True)


def _plain(theta: Tensor) -> Tensor:
    return theta.detach().as_subclass(Tensor)


def _dtype(theta: Tensor, master: torch.dtype | None) -> torch.dtype:
    return theta.dtype if master is None else torch.promote_types(theta.dtype, master)


def _joined(parts: Sequence[Weights], names: Sequence[str]) -> Weights:
    """Join the weights of different parameters, in the order of their names."""
    fields = zip(*parts, strict=True)
    joined = [{name: leaf for tree in trees for name, leaf in tree.items()} for trees in fields]
    return type(parts[0])(*({n: tree[n] for n in names if n in tree} for tree in joined))
