"""What must agree: a state with the model, configuration and optimiser that go on from it."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import nn

from topkast_func.config import TopKastConfig
from topkast_func.config.allocation import allocate, given_sparsity
from topkast_func.kernels.pattern import block_of
from topkast_func.masks import counts, counts_among, is_of_blocks, uneven_sets
from topkast_func.model.forward import check_weight_sets
from topkast_func.model.modules import frozen, parameters_of, tensors_of, trainable
from topkast_func.storage.compact import CompactWeights
from topkast_func.storage.dense import DenseWeights
from topkast_func.training.optim import Optimizer, slot_problem
from topkast_func.training.state import TrainState
from topkast_func.types import Masks, Model, Params, Tensors

Facts: TypeAlias = Mapping[str, Mapping[str, object]]
"""What is known of tensors, such as their "shape" and "dtype", by name."""

EXCHANGED = (
    "{!r} requires {} gradient, but the state {} it: undo that, or, to change what is trained, "
    "begin anew with init_state, from a module that has loaded dense_params(state)"
)
ROLES = {False: ("no", "trains"), True: ("a", "holds and freezes")}
COMPACT = (
    "{} may need the shapes of weights, and compact storage keeps the entries of B in one row: "
    "pass storage='dense' to init_state, or make it with elementwise=True if it does not"
)

UNEVEN = "not as many in each group, as pattern={!r} asks for"


def check_masks(params: Params, masks: Mapping[str, Masks], config: TopKastConfig) -> None:
    """Check that sets are those that a configuration could have chosen at the start.

    Args:
        params: Weights by name.
        masks: Sets by name.
        config: The configuration.

    Raises:
        TypeError: The sets are not `Masks` of bool.
        ValueError: They are of other parameters, of other shapes or sizes, not made of whole
            blocks or not as many in each group, or A is not part of B.
    """
    asked = counts(params, config)
    if masks.keys() != asked.keys():
        missing, unknown = sorted(asked.keys() - masks.keys()), sorted(masks.keys() - asked.keys())
        raise ValueError(
            f"masks must be those of the sparse parameters: missing {missing}, unknown {unknown}; "
            "sparse= and keep_dense= say which are sparse"
        )
    for name, expected in asked.items():
        sets = masks[name]
        check_weight_sets(name, sets, params[name].shape)
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


def disagreements(
    state: TrainState,
    config: TopKastConfig,
    *,
    params: Params | None = None,
    model: Model | None = None,
    optimizer: Optimizer | None = None,
) -> list[str]:
    """Say in what a state is not one of a model, a configuration and an optimiser.

    Args:
        state: The state.
        config: The configuration.
        params: Parameters to ask about which are sparse; None where only a module could tell.
        model: The model; None, or a function, for any.
        optimizer: The optimiser; None for any.

    Returns:
        What goes on after "the state is": the first difference from each of the three.
    """
    of_model = _model_problem(state, model) if isinstance(model, nn.Module) else None
    of_optimizer = None if optimizer is None else _optimizer_problem(state, optimizer)
    told = {
        "model": of_model,
        "configuration": _config_problem(state, config, params),
        "optimiser": of_optimizer,
    }
    return [f"of another {what}: {problem}" for what, problem in told.items() if problem]


def check_tensors(state: TrainState, model: nn.Module) -> None:
    """Check that a state has the tensors of a module in their shapes, whichever it trains.

    Args:
        state: The state.
        model: The module.

    Raises:
        ValueError: It has not.
    """
    others = {name: tensor.shape for name, tensor in {**state.frozen, **state.buffers}.items()}
    shapes = {**state.weights.shapes(), **others}
    found = {name: {"shape": tuple(shape)} for name, shape in shapes.items()}
    expected = {n: {"shape": tuple(tensor.shape)} for n, tensor in tensors_of(model).items()}
    if problem := _tensor_problem("tensors", found, expected):
        raise ValueError(f"the state is of another model: {problem}")


def agreement(
    model: Model, config: TopKastConfig, optimizer: Optimizer
) -> Callable[[TrainState], None]:
    """Return a check that a state is one of a model, a configuration and an optimiser.

    Args:
        model: The model.
        config: The configuration.
        optimizer: The optimiser.

    Returns:
        The check. It is quick for what looks as the last state did that agreed, and raises
        ValueError where a state does not, or a parameter has begun or ceased to be trained.
    """
    parameters = parameters_of(model)
    agreed: Hashable = None

    def check(state: TrainState) -> None:
        nonlocal agreed
        for name, (module, key) in parameters.items():
            parameter = module._parameters.get(key)
            if parameter is not None and parameter.requires_grad == (name in state.frozen):
                raise ValueError(EXCHANGED.format(name, *ROLES[name in state.frozen]))
        if (looks := _looks(state, config)) == agreed:
            return
        asked: Params | None = trainable(model) if isinstance(model, nn.Module) else None
        if asked is None and not callable(config.sparse):
            asked = outlines(state.weights)
        problems = disagreements(state, config, params=asked, model=model, optimizer=optimizer)
        if problems:
            raise ValueError(f"the state is {problems[0]}")
        agreed = looks

    return check


def check_refresh(weights: CompactWeights | DenseWeights, config: TopKastConfig, step: int) -> None:
    """Check that the sets of a state can be chosen anew by a configuration.

    Args:
        weights: The weights of the state.
        config: The configuration.
        step: Number of the step that comes next.

    Raises:
        ValueError: Its method is to train densely, it has other blocks, or, where no predicate
            says which, other parameters are sparse.
    """
    problem = _method_problem(weights, config) or _block_problem(weights, config)
    if not problem and not callable(config.sparse):
        problem = _selection_problem(weights, config, outlines(weights), step)
    if problem:
        raise ValueError(f"the state is of another configuration: {problem}")


def is_of_stage(weights: CompactWeights | DenseWeights, config: TopKastConfig, step: int) -> bool:
    """Return whether sets have the sizes that a configuration asks for at a step."""
    shapes = {name: weights.shapes()[name] for name in weights.sparse()}
    return weights.sizes() == counts_among(shapes, config, step)


def outlines(weights: CompactWeights | DenseWeights) -> Tensors:
    """Return tensors without values in the place of all parameters."""
    kinds = weights.values()
    return {
        name: torch.empty(shape, dtype=kinds[name].dtype, device="meta")
        for name, shape in weights.shapes().items()
    }


def _looks(state: TrainState, config: TopKastConfig) -> Hashable:
    """Return what differs between any two states of which one may agree and the other not."""
    step, weights = int(state.step), state.weights
    trees = (weights.values(), state.frozen, state.buffers, state.narrow)
    slots = state.optimizer.slots
    return (
        (config.schedule.stage(step), config.schedule.settled(step)),
        (type(weights), weights.sets_key(), tuple(weights.shapes().items())),
        tuple((name, float(exponent)) for name, exponent in state.exponents.items()),
        tuple(_kinds(tree) for tree in trees),
        tuple((kind, _kinds(tree)) for kind, tree in slots.items()),
    )


def _kinds(tensors: Params) -> Hashable:
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())


def _config_problem(state: TrainState, config: TopKastConfig, params: Params | None) -> str | None:
    weights, step = state.weights, int(state.step)
    return (
        _method_problem(weights, config)
        or _block_problem(weights, config)
        or (_selection_problem(weights, config, params, step) if params else None)
        or _exponent_problem(state, config, params)
        or _size_problem(weights, config, step)
        or _group_problem(weights, config)
    )


def _method_problem(weights: CompactWeights | DenseWeights, config: TopKastConfig) -> str | None:
    if config.method.sparsifies or not weights.sparse():
        return None
    return (
        f"method={config.method} chooses no sets, and there are some: begin dense training with "
        "init_state, from a module that has loaded dense_params(state)"
    )


def _block_problem(weights: CompactWeights | DenseWeights, config: TopKastConfig) -> str | None:
    values, block = weights.values(), config.block_shape
    for name in weights.layers():
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
    weights: CompactWeights | DenseWeights, config: TopKastConfig, params: Params, step: int
) -> str | None:
    try:
        asked = allocate(params, config, step=step)
        problem = _difference("sparse parameters", weights.sparse(), asked)
    except ValueError as reason:
        problem = str(reason)
    plain = not any(isinstance(parameter, nn.Parameter) for parameter in params.values())
    if problem and callable(config.sparse) and plain:
        problem += " (the predicate was asked about plain tensors: pass the module as model)"
    return problem


def _exponent_problem(
    state: TrainState, config: TopKastConfig, params: Params | None
) -> str | None:
    powered: Iterable[str] = ()
    if config.powerprop > 1.0:
        powered = given_sparsity(params, config) if params else state.weights.sparse()
    found = {name: float(exponent) for name, exponent in state.exponents.items()}
    if found == dict.fromkeys(powered, config.powerprop):
        return None
    return f"powerprop is {found or 1.0}, the configuration asks for {config.powerprop}"


def _size_problem(
    weights: CompactWeights | DenseWeights, config: TopKastConfig, step: int
) -> str | None:
    """Say what is not as it is asked for, before or after a refresh that is due."""
    shapes = {name: weights.shapes()[name] for name in weights.sparse()}
    found, asked = weights.sizes(), counts_among(shapes, config, step)
    if found in (asked, counts_among(shapes, config, max(step - 1, 0))):
        return None
    active = {name: forward for name, (forward, _) in found.items()}
    if step == config.explore_until and active == {n: sizes[0] for n, sizes in asked.items()}:
        return None
    name = next(name for name in found if found[name] != asked[name])
    return (
        f"{name!r} has {found[name]} entries in A and B, the configuration asks for {asked[name]} "
        f"at step {step}: to go on with other sparsities, call refresh(state, config) first"
    )


def _group_problem(weights: CompactWeights | DenseWeights, config: TopKastConfig) -> str | None:
    names = uneven_sets(weights.masks(), config) if config.group else ()
    told = f"{UNEVEN.format(config.pattern)}: call refresh(state, config) first"
    return f"the sets of {names} are {told}" if names else None


def _model_problem(state: TrainState, model: nn.Module) -> str | None:
    shapes, narrow = state.weights.shapes(), state.narrow
    parameters: Facts = {
        name: {"shape": tuple(shapes[name]), "dtype": narrow.get(name, value).dtype}
        for name, value in state.weights.values().items()
    }
    sides = {
        "parameters": (parameters, _facts(trainable(model))),
        "frozen parameters": (_facts(state.frozen), _facts(frozen(model))),
        "buffers": (_facts(state.buffers), _facts(dict(model.named_buffers()))),
    }
    problems = (_tensor_problem(what, *both) for what, both in sides.items())
    return next(filter(None, problems), None)


def _facts(tensors: Params) -> Facts:
    return {name: {"shape": tuple(t.shape), "dtype": t.dtype} for name, t in tensors.items()}


def _tensor_problem(what: str, found: Facts, expected: Facts) -> str | None:
    if problem := _difference(what, found, expected):
        return problem
    for name, facts in expected.items():
        for kind, fact in facts.items():
            if found[name][kind] != fact:
                return f"{name!r} has {kind} {found[name][kind]}, the model {fact}"
    return None


def _optimizer_problem(state: TrainState, optimizer: Optimizer) -> str | None:
    if isinstance(state.weights, CompactWeights) and not optimizer.elementwise:
        return COMPACT.format(optimizer)
    return slot_problem(state.optimizer.slots, state.weights.values(), optimizer)


def _difference(what: str, found: Iterable[str], expected: Iterable[str]) -> str | None:
    if {*found} == {*expected}:
        return None
    missing, unknown = {*expected} - {*found}, {*found} - {*expected}
    return f"of the {what} missing {sorted(missing)}, unknown {sorted(unknown)}"
