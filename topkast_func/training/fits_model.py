"""Whether a state fits a module: the tensors of both, by name."""

from collections.abc import Mapping
from typing import TypeAlias

from torch import nn

from topkast_func.model.modules import buffers_of, frozen, tensors_of, trainable
from topkast_func.training.state import TrainState
from topkast_func.trees import difference
from topkast_func.types import Params

Facts: TypeAlias = Mapping[str, Mapping[str, object]]
"""Facts about tensors by name, such as their "shape" and "dtype"."""


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


def model_problem(state: TrainState, model: nn.Module) -> str | None:
    """Say where a state does not fit a module.

    Args:
        state: The state.
        model: The module.

    Returns:
        The first difference, or None.
    """
    shapes, narrow = state.weights.shapes(), state.narrow
    parameters: Facts = {
        name: {"shape": tuple(shapes[name]), "dtype": narrow.get(name, value).dtype}
        for name, value in state.weights.values.items()
    }
    sides = {
        "parameters": (parameters, _facts(trainable(model))),
        "frozen parameters": (_facts(state.frozen), _facts(frozen(model))),
        "buffers": (_facts(state.buffers), _facts(buffers_of(model))),
    }
    problems = (_tensor_problem(what, *both) for what, both in sides.items())
    return next(filter(None, problems), None)


def _facts(tensors: Params) -> Facts:
    return {name: {"shape": tuple(t.shape), "dtype": t.dtype} for name, t in tensors.items()}


def _tensor_problem(what: str, found: Facts, expected: Facts) -> str | None:
    if problem := difference(what, found, expected):
        return problem
    for name, facts in expected.items():
        for kind, fact in facts.items():
            if found[name][kind] != fact:
                return f"{name!r} has {kind} {found[name][kind]}, the model {fact}"
    return None
