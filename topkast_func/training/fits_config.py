"""Whether sets, and a state that has them, fit a configuration."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from topkast_func.block_masks import is_of_blocks
from topkast_func.config import TopKastConfig
from topkast_func.config.allocation import allocate, given_sparsity
from topkast_func.kernels.pattern import block_of
from topkast_func.leaves import check_leaf, check_present, check_shape
from topkast_func.masks import counts, counts_among, uneven_sets
from topkast_func.storage.weights import Weights
from topkast_func.training.state import TrainState
from topkast_func.trees import check_mask_pair, check_named, difference
from topkast_func.types import Masks, Params, Tensors

UNEVEN = "not as many in each group, as pattern={!r} asks for"
ANEW = "begin anew with init_state, from a module that has loaded dense_params(state)"


def check_masks(params: Params, masks: Mapping[str, Masks], config: TopKastConfig) -> None:
    """Check that sets are those that a configuration could have chosen at the start.

    Args:
        params: Weights by name.
        masks: Sets by name.
        config: The configuration.

    Raises:
        TypeError: The sets are not `Masks` of bool by name.
        ValueError: They are without values, of other parameters, of other shapes or sizes, not made
            of whole blocks or not as many in each group, or A is not part of B.
    """
    check_named("masks", masks, "Masks")
    asked = counts(params, config)
    if masks.keys() != asked.keys():
        missing, unknown = sorted(asked.keys() - masks.keys()), sorted(masks.keys() - asked.keys())
        raise ValueError(
            f"masks must be those of the sparse parameters: missing {missing}, unknown {unknown}; "
            "sparse= and keep_dense= say which are sparse"
        )
    for name, expected in asked.items():
        sets = masks[name]
        check_mask_pair(f"masks[{name!r}]", sets, params[name].shape)
        for mask in sets:
            check_present(f"masks[{name!r}]", mask)
        if (sets.forward & ~sets.backward).any():
            raise ValueError(f"masks[{name!r}]: the forward mask is not part of the backward mask")
        if not all(is_of_blocks(mask, config.block_shape) for mask in sets):
            raise ValueError(f"masks[{name!r}] are not made of blocks of {config.block_shape}")
        found = tuple(int(mask.sum()) for mask in sets)
        if found != expected:
            raise ValueError(
                f"masks[{name!r}] have {found} entries in A and B, the configuration asks for "
                f"{expected}: give densities of their own by allocation={{pattern: density}}"
            )
    if names := uneven_sets(masks, config):
        raise ValueError(f"masks of {names} are {UNEVEN.format(config.pattern)}")


def check_refresh(state: TrainState, config: TopKastConfig) -> None:
    """Check that the sets of a state can be chosen anew by a configuration.

    Args:
        state: The state.
        config: The configuration.

    Raises:
        ValueError: Its method is to train densely, it has other blocks or another exponent, or,
            where no predicate says which, other parameters are sparse.
    """
    weights, step = state.weights, int(state.step)
    params = None if callable(config.sparse) else outlines(weights)
    problem = (
        _method_problem(weights, config)
        or _block_problem(weights, config)
        or (_selection_problem(weights, config, params, step) if params else None)
        or _exponent_problem(state, config, params)
    )
    if problem:
        raise ValueError(f"the state is of another configuration: {problem}")


def check_gradients(state: TrainState, gradients: Params) -> None:
    """Check that gradients are those of the sparse parameters of a state; of others may be some.

    Args:
        state: The state.
        gradients: Gradients by name.

    Raises:
        TypeError: One is no dense tensor of real floating-point numbers.
        ValueError: One is missing, of no parameter, of another shape, or without values.
    """
    check_named("gradients", gradients)
    shapes, sparse = state.weights.shapes(), [*state.weights.sparse_names]
    known = [name for name in shapes if name in gradients or name in sparse]
    if problem := difference("sparse parameters", gradients, known):
        raise ValueError(
            f"gradients must be those that dense_gradients(model, loss_fn, state, batch) returns: "
            f"{problem}"
        )
    for name in sparse:
        what, gradient = f"gradients[{name!r}]", gradients[name]
        check_leaf(what, gradient)
        check_shape(what, gradient, shapes[name])
        check_present(what, gradient)
        if gradient.is_complex():
            raise TypeError(f"{what} is {gradient.dtype}, and the parameter is real")


def is_of_stage(weights: Weights, config: TopKastConfig, step: int) -> bool:
    """Return whether sets have the sizes that a configuration asks for at a step."""
    shapes = {name: weights.shapes()[name] for name in weights.sparse_names}
    return weights.sizes() == counts_among(shapes, config, step)


def config_problem(state: TrainState, config: TopKastConfig, params: Params | None) -> str | None:
    """Say where a state does not fit a configuration.

    Args:
        state: The state.
        config: The configuration.
        params: Parameters to ask about which are sparse; None where only a module could tell.

    Returns:
        The first difference, or None.
    """
    weights, step = state.weights, int(state.step)
    return (
        _method_problem(weights, config)
        or _block_problem(weights, config)
        or (_selection_problem(weights, config, params, step) if params else None)
        or _exponent_problem(state, config, params)
        or _size_problem(weights, config, step)
        or _group_problem(weights, config, step)
    )


def outlines(weights: Weights) -> Tensors:
    """Return a tensor on the meta device for every parameter."""
    kinds = weights.values
    return {
        name: torch.empty(shape, dtype=kinds[name].dtype, device="meta")
        for name, shape in weights.shapes().items()
    }


def _method_problem(weights: Weights, config: TopKastConfig) -> str | None:
    if config.method.sparsifies or not weights.sparse_names:
        return None
    return f"method={config.method} chooses no sets, and there are some: to train densely, {ANEW}"


def _block_problem(weights: Weights, config: TopKastConfig) -> str | None:
    values, block = weights.values, config.block_shape
    for name in weights.patterns:
        if (found := block_of(values[name])) != block:
            return (
                f"it has {name!r} in blocks of {found}, the configuration asks for {block}: begin "
                "anew with init_state"
            )
    for name, masks in weights.masks().items() if block != (1, 1) else ():
        if not all(is_of_blocks(mask, block) for mask in masks):
            return (
                f"the sets of {name!r} are not made of blocks of {block}, which the configuration "
                "asks for: begin anew with init_state"
            )
    return None


def _selection_problem(
    weights: Weights, config: TopKastConfig, params: Params, step: int
) -> str | None:
    way_on = f": to change which they are, {ANEW}"
    try:
        asked = allocate(params, config, step=step)
        problem = difference("sparse parameters", weights.sparse_names, asked)
    except ValueError as reason:
        problem, way_on = str(reason), ""
    plain = not any(isinstance(parameter, nn.Parameter) for parameter in params.values())
    if callable(config.sparse) and plain:
        way_on = " (the predicate was asked about plain tensors: pass the module as model)"
    return problem and problem + way_on


def _exponent_problem(
    state: TrainState, config: TopKastConfig, params: Params | None
) -> str | None:
    powered: Iterable[str] = ()
    if config.powerprop > 1.0:
        powered = state.weights.sparse_names if config.method.sparsifies else state.exponents
        powered = given_sparsity(params, config) if params else powered
    found = {name: float(exponent) for name, exponent in state.exponents.items()}
    if found == dict.fromkeys(powered, config.powerprop):
        return None
    return f"powerprop is {found or 1.0}, the configuration asks for {config.powerprop}: {ANEW}"


def _size_problem(weights: Weights, config: TopKastConfig, step: int) -> str | None:
    """Say which sizes are not those asked for, before or after a refresh that is due."""
    shapes = {name: weights.shapes()[name] for name in weights.sparse_names}
    found, asked = weights.sizes(), counts_among(shapes, config, step)
    if found in (asked, counts_among(shapes, config, max(step - 1, 0))):
        return None
    active = {name: forward for name, (forward, _) in found.items()}
    if step == config.explore_until and active == {n: sizes[0] for n, sizes in asked.items()}:
        return None
    name = next(name for name in found if found[name] != asked[name])
    return (
        f"{name!r} has {found[name]} entries in A and B, the configuration asks for {asked[name]} "
        f"at step {step}: {_way_on(config, step)}"
    )


def _way_on(config: TopKastConfig, step: int) -> str:
    """Say how a state gets the sets that a configuration asks for."""
    refresh, until = "call refresh(state, config) first", config.explore_until
    if config.schedule.settled(step):
        return f"from explore_until={until} on sets stay; give a later one, and {refresh}"
    return f"to go on with other sets, {refresh}"


def _group_problem(weights: Weights, config: TopKastConfig, step: int) -> str | None:
    names = uneven_sets(weights.masks(), config) if config.group else ()
    told = f"{UNEVEN.format(config.pattern)}: {_way_on(config, step)}"
    return f"the sets of {names} are {told}" if names else None
