"""What must agree: a state with the model, configuration and optimiser that go on from it."""

from collections.abc import Callable, Hashable
from typing import Any

from torch import nn

from topkast_func.config import TopKastConfig
from topkast_func.model.alone import parts_of
from topkast_func.model.modules import REPLACED, parameters_of, ties, trainable
from topkast_func.storage.compact import CompactWeights
from topkast_func.training.fits_config import config_problem, outlines
from topkast_func.training.fits_model import model_problem
from topkast_func.training.optim import Optimizer, slot_problem
from topkast_func.training.state import TrainState
from topkast_func.training.watch import MANY
from topkast_func.types import Model, Params

EXCHANGED = (
    "{!r} requires {} gradient, but the state {} it: undo that, or, to change what is trained, "
    "begin anew with init_state, from a module that has loaded dense_params(state)"
)
TIED = (
    "the parameters that are tied are no longer those that were when make_train_step was called, "
    "{} and now {}: undo that, or begin anew with init_state, from a module that has loaded "
    "dense_params(state)"
)
PARTS = (
    "the model consists of other modules, {}, than when make_train_step was called, {}: undo that, "
    "or call make_train_step again, and, where its parameters are others, begin anew with "
    "init_state, from a module that has loaded dense_params(state)"
)
HOOKED = (
    "{!r} has a hook on its gradient, which a step does not call: remove it, and do what it does "
    "in a part of the optimizer, see tk.chain, or train in an ordinary loop, by tk.sparsify"
)
ROLES = {False: ("no", "trains"), True: ("a", "holds and freezes")}
COMPACT = (
    "{} may need the shapes of weights, and compact storage keeps the entries of B in one row: "
    "pass storage='dense' to init_state, or make it with elementwise=True if it does not"
)

ANOTHER = (
    "to go on with another optimiser from its beginning, "
    "state._replace(optimizer=optimizer.init(state.weights.values))"
)


def disagreements(
    state: TrainState,
    config: TopKastConfig,
    *,
    params: Params | None = None,
    model: Model | None = None,
    optimizer: Optimizer | None = None,
) -> list[str]:
    """Say where a state does not fit a model, a configuration and an optimiser.

    Args:
        state: The state.
        config: The configuration.
        params: Parameters to ask about which are sparse; None where only a module could tell.
        model: The model; None, or a function, for any.
        optimizer: The optimiser; None for any.

    Returns:
        What goes on after "the state is": the first difference from each of the three.
    """
    of_model = model_problem(state, model) if isinstance(model, nn.Module) else None
    of_optimizer = None if optimizer is None else _optimizer_problem(state, optimizer)
    told = {
        "model": of_model,
        "configuration": config_problem(state, config, params),
        "optimiser": of_optimizer,
    }
    return [f"of another {what}: {problem}" for what, problem in told.items() if problem]


def agreement(
    model: Model, config: TopKastConfig, optimizer: Optimizer
) -> Callable[[TrainState, list[Any], Hashable], None]:
    """Return a check that a state is one of a model, a configuration and an optimiser.

    Args:
        model: The model.
        config: The configuration.
        optimizer: The optimiser.

    Returns:
        The check of a state, of the parts that the model has by now, and of how the state `looks`.
        It is quick for what looks as the last state did that agreed, and raises ValueError where a
        state does not, or the module has become another: it has other parts, tensors or ties, or a
        parameter has a hook, or has begun or ceased to be trained.
    """
    parameters, tied, parts = parameters_of(model), ties(model), parts_of(model)
    schedule = config.schedule
    agreed: set[Hashable] = set()

    def check(state: TrainState, now: list[Any], look: Hashable) -> None:
        nonlocal agreed
        if now != parts:
            raise ValueError(PARTS.format(len(now), len(parts)))
        first: dict[int, str] = {}
        for name, (module, key) in parameters.items():
            parameter = module._parameters.get(key)
            if parameter is None:
                continue
            if first.setdefault(id(parameter), name) != tied.get(name, name):
                raise ValueError(TIED.format(tied or "none", ties(model) or "none"))
            if not isinstance(parameter, nn.Parameter):
                raise ValueError(REPLACED.format(name))
            role = tied.get(name, name) in state.frozen
            if parameter.requires_grad == role:
                raise ValueError(EXCHANGED.format(name, *ROLES[role]))
            hooks = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
            if hooks and not role:
                raise ValueError(HOOKED.format(name))
        step = int(state.step)
        stage = schedule.stage(step), schedule.settled(step)
        if (looks := (stage, look, _held(parts))) in agreed:
            return
        asked: Params | None = trainable(model) if isinstance(model, nn.Module) else None
        if asked is None and not callable(config.sparse):
            asked = outlines(state.weights)
        problems = disagreements(state, config, params=asked, model=model, optimizer=optimizer)
        if problems:
            raise ValueError(f"the state is {problems[0]}")
        agreed = {looks, *(agreed if len(agreed) < MANY else ())}

    return check


def _held(parts: list[Any]) -> Hashable:
    """Return the keys, shapes and dtypes of the tensors that each part of a module has."""
    trees = [(p._parameters, p._buffers) for p in parts if isinstance(p, nn.Module)]
    return tuple(
        tuple((key, t.shape, t.dtype) for tree in pair for key, t in tree.items() if t is not None)
        for pair in trees
    )


def _optimizer_problem(state: TrainState, optimizer: Optimizer) -> str | None:
    if isinstance(state.weights, CompactWeights) and not optimizer.elementwise:
        return COMPACT.format(optimizer)
    problem = slot_problem(state.optimizer.slots, state.weights.values, optimizer)
    return problem and f"{problem}: {ANOTHER}"
