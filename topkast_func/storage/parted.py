"""Compact weights of which other processes own some: θ of these is on the meta device."""

from collections.abc import Collection

import torch

from topkast_func.kernels.pattern import block_of
from topkast_func.storage.compact import CompactWeights
from topkast_func.storage.index import split_in_pieces
from topkast_func.storage.weights import Weights
from topkast_func.types import Params, Tensors, changed

DENSE = (
    "shard='owners' takes compact storage: in dense storage each rank computes with all of θ, "
    "which owners are to spare it"
)


def compact_in(weights: Weights) -> CompactWeights:
    """Return weights if they are in compact storage.

    Args:
        weights: The weights.

    Returns:
        The weights.

    Raises:
        ValueError: They are in dense storage.
    """
    if not isinstance(weights, CompactWeights):
        raise ValueError(DENSE)
    return weights


def active(weights: CompactWeights) -> Tensors:
    """Return what the forward pass reads: the values of A, and dense parameters."""
    return {
        name: value[: weights.sets(name).active_count] if name in weights.theta else value
        for name, value in weights.values.items()
    }


def with_active(weights: CompactWeights, values: Params) -> CompactWeights:
    """Return weights with others in the place of what `active` returns."""
    held = {
        name: torch.cat([values[name], value[len(values[name]) :]])
        if name in weights.theta
        else values[name]
        for name, value in weights.values.items()
    }
    return changed(weights, values=held)


def without(weights: CompactWeights, others: Collection[str]) -> CompactWeights:
    """Leave θ of some parameters to other processes, but for the values of A."""
    held, theta = dict(weights.values), dict(weights.theta)
    for name in theta.keys() & others:
        held[name], theta[name] = torch.zeros_like(held[name]), theta[name].to("meta")
    return with_active(changed(weights, values=held, theta=theta), active(weights))


def with_theta(weights: CompactWeights, dense: Params) -> CompactWeights:
    """Return weights with θ of some parameters, up to date."""
    held, theta = dict(weights.values), {**weights.theta, **dense}
    for name, whole in dense.items():
        value = held[name]
        places = weights.sets(name).flat_index(block_of(value), whole.shape)
        held[name] = split_in_pieces(whole, places.to(whole.device)).to(value.device)
    return changed(weights, values=held, theta=theta)
