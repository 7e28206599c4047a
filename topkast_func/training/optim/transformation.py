"""What an optimiser is: pure functions from gradients to updates, and what it remembers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topkast_func.checks import check_callable, check_count
from topkast_func.training.optim.rates import Rate
from topkast_func.types import Params, Tensors


class OptimizerState(NamedTuple):
    """What an optimiser remembers.

    Attributes:
        step: Calls of ``update`` so far, int64, 0-d, on the CPU; `train_step` gives it to
            ``update``, as the learning rate, on the device of the values.
        slots: For each kind of slot, such as ``adamw.exp_avg``, a tensor by the name of each
            parameter that has one. A slot of the shape of the parameter's values follows its
            weights at a refresh and is zero outside B; a slot of any other shape (0-d, one entry
            per row) stays as it is.
    """

    step: Tensor
    slots: dict[str, Tensors]


@dataclass(frozen=True, repr=False)
class Transformation:
    """A pair of pure functions from updates to updates, as in optax: a part of `chain`.

    What these are given are tensors by name, one for each trained parameter, of its dtype: in dense
    storage of its shape, in compact storage the values of B in a row, [|B|] or [blocks, r, c].

    Attributes:
        init: ``init(params)`` to the `OptimizerState` before the first update. It has the same
            kinds of slots for any parameters, none of them included, and asks a parameter for shape
            and dtype alone: it is called with tensors of the meta device too, which have no values,
            to see whether the slots of a state are its own.
        update: ``update(updates, state, params)`` to (updates, state), with ``step`` one more and
            slots of the same shapes and dtypes. Nothing is written to. It is compiled with the
            step, and so takes no decision by a value: ``torch.where`` in place of ``if``.
        elementwise: Whether it asks no more of a parameter than its entries, in any arrangement.
            What needs to know rows and columns trains in dense storage alone: compact storage
            keeps the entries of B in one row.
        name: How it prints.
    """

    init: Callable[[Params], OptimizerState]
    update: Callable[..., tuple[Tensors, OptimizerState]]
    elementwise: bool = field(default=False, kw_only=True)
    name: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        """Check that there are functions."""
        check_callable("init", self.init)
        check_callable("update", self.update)

    def __repr__(self) -> str:
        """Print the name, or the kind where there is none."""
        return self.name or f"{type(self).__name__}(...)"


@dataclass(frozen=True, repr=False)
class Optimizer(Transformation):
    """A pair of pure functions from gradients to updates, and the schedule between them.

    Two are equal where they are made of equal functions and numbers; those of this library can
    be hashed and pickled, where their schedules can.

    Attributes:
        init: See `Transformation`.
        update: ``update(grads, state, params, lr=None)`` to (updates, state); the updates are
            to be added to the parameters. ``lr`` None takes ``learning_rate(state.step)``.
        learning_rate: ``learning_rate(step)`` to the learning rate of that call, 0-d, at least 0.
        every: How many calls make one update of the parameters; see `multi_steps`.

    Example:
        >>> def init(params):
        ...     return OptimizerState(torch.zeros((), dtype=torch.int64), {})
        >>> def update(grads, state, params, lr):
        ...     updates = {name: -lr * grad.sign() for name, grad in grads.items()}
        ...     return updates, OptimizerState(state.step + 1, {})
        >>> tenth = lambda step: torch.tensor(0.1)
        >>> signs = Optimizer(init, update, tenth, elementwise=True, name="signs")
        >>> gradients = {"weight": torch.tensor([2.0, -3.0])}
        >>> signs.update(gradients, signs.init({}), gradients, signs.learning_rate(0))[0]
        {'weight': tensor([-0.1000,  0.1000])}
    """

    learning_rate: Callable[[Tensor], Rate]
    every: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        """Check what can be checked before the first step."""
        super().__post_init__()
        check_callable("learning_rate", self.learning_rate)
        object.__setattr__(self, "every", check_count("every", self.every, 1))


@dataclass(frozen=True)
class Given:
    """A function whose first argument is given: a partial that is equal where its parts are.

    Attributes:
        function: The function.
        first: Its first argument.
    """

    function: Callable[..., Any]
    first: Any

    def __call__(self, *others: Any, **named: Any) -> Any:
        """Call the function."""
        return self.function(self.first, *others, **named)


def check_optimizer(optimizer: object) -> None:
    """Check that an optimiser is one of this library, or made as its are.

    Args:
        optimizer: What is to be one.

    Raises:
        TypeError: It is not.
    """
    if isinstance(optimizer, Optimizer):
        return
    if isinstance(optimizer, Transformation):
        raise TypeError(f"{optimizer} is a part of an optimiser: chain({optimizer}, adamw(lr))")
    name = getattr(optimizer, "__name__", type(optimizer).__name__)
    hint = ""
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    if issubclass(kind, torch.optim.Optimizer):
        hint = (
            ", which moves the parameters of a module, where a state has weights of its own: it is "
            "for ordinary loops, after tk.sparsify"
        )
    elif hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        hint = (
            ", a pair as torchopt and optax have it, whose state is no OptimizerState, and which "
            "torch does not compile (torchopt's adam): write tk.Optimizer(init, update, "
            "learning_rate), as its documentation shows"
        )
    elif callable(optimizer):
        hint = f": call it, {name}(...)"
    raise TypeError(
        f"optimizer must be what sgd(), adam(), adamw() or lion() returns, got {name}{hint}"
    )


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the precision that updates are computed in, float32 at the least.

    Args:
        tensor: Of any floating dtype.

    Returns:
        It, in float32 where it was of half precision, else as it was.
    """
    return cast(tensor, torch.promote_types(tensor.dtype, torch.float32))


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype, without a call where it has that already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def starting(slots: dict[str, Tensors]) -> OptimizerState:
    """Return the state before the first update.

    Args:
        slots: What is remembered at the start.

    Returns:
        The state.
    """
    return OptimizerState(torch.zeros((), dtype=torch.int64, device="cpu"), slots)


def check_distinct(what: str, kinds: list[str]) -> None:
    """Check that the parts of an optimiser have slots of their own.

    Args:
        what: What they are parts of.
        kinds: The kinds of slots of them all.

    Raises:
        ValueError: Two are the same.
    """
    if repeated := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        raise ValueError(f"two parts of {what} have slots {repeated}: give one of them other names")


def slot_problem(slots: dict[str, Tensors], values: Params, optimizer: Optimizer) -> str | None:
    """Say where slots are not as an optimiser makes them.

    Args:
        slots: By kind and name.
        values: What is updated.
        optimizer: The optimiser.

    Returns:
        The first difference, or None.

    Raises:
        TypeError: The optimiser makes none without values.
    """
    shapes = {name: torch.empty_like(value, device="meta") for name, value in values.items()}
    try:
        expected = optimizer.init(shapes).slots
    except (RuntimeError, NotImplementedError) as reason:
        raise TypeError(
            f"init of {optimizer} must make its slots by the shapes and dtypes of parameters: it "
            f"fails on the meta device, where these have no values ({reason})"
        ) from reason
    return slots_differ(slots, expected, f"those of {optimizer}")


def slots_differ(
    slots: dict[str, Tensors], expected: dict[str, Tensors], others: str
) -> str | None:
    """Say in what slots differ from others: kinds, names, shapes or dtypes.

    Args:
        slots: By kind and name.
        expected: What they should be like.
        others: What those are called.

    Returns:
        The first difference, or None.
    """
    if slots.keys() != expected.keys():
        return f"slots are {sorted(slots)}, {others} are {sorted(expected)}"
    for kind, tree in expected.items():
        if slots[kind].keys() != tree.keys():
            return f"slots {kind!r} are of {sorted(slots[kind])}, {others} of {sorted(tree)}"
        for name, slot in tree.items():
            found = slots[kind][name]
            if (found.shape, found.dtype) != (slot.shape, slot.dtype):
                return (
                    f"slot {kind!r} of {name!r} has shape {tuple(found.shape)} and {found.dtype}, "
                    f"{others} {tuple(slot.shape)} and {slot.dtype}"
                )
    return None
