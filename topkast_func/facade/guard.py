"""What a step of any `torch.optim` optimiser may move: nothing outside B."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from topkast_func.facade.derived import check_whole
from topkast_func.facade.keeping import keep_within
from topkast_func.facade.leaks import say_what_leaks
from topkast_func.facade.patience import say_that_it_is_forgotten
from topkast_func.facade.slots import as_it_begins, slots_of
from topkast_func.facade.sparse_weight import SparseWeight
from topkast_func.facade.unfinished import hold_on_to
from topkast_func.facade.views import check_apart_from_others
from topkast_func.facade.watched import enlist, enlisted, watched
from topkast_func.reading import dispatches


class Held(NamedTuple):
    """A sparse weight before a step of its optimiser.

    Attributes:
        layer: Whose weight it is.
        weight: What the layer keeps for it.
        theta: θ.
        before: A copy of θ.
        group: The group of the optimiser that it is in.
    """

    layer: nn.Module
    weight: SparseWeight
    theta: nn.Parameter
    before: Tensor
    group: Mapping[str, Any]


class Steps:
    """The steps of an optimiser that have begun, one within another where it calls that of a base.

    Attributes:
        held: The sparse weights before each.
        running: How many of them are moving weights.
        known: How many layers had been watched when its parameters were last looked at.
    """

    def __init__(self) -> None:
        self.held: list[list[Held]] = []
        self.running = 0
        self.known = 0


_BEGUN: "WeakKeyDictionary[Optimizer, Steps]" = WeakKeyDictionary()
_COPIES: "WeakKeyDictionary[Optimizer, dict[int, Tensor]]" = WeakKeyDictionary()
"""Of its last step, by the id of the parameter, to be written to again on a CPU, where memory that
is new to a process costs four times the copying."""

_steps_made = 0


def watch(layer: nn.Module) -> None:
    """Guard the sparse weights of a layer as long as it lives, whichever optimiser has them."""
    enlist(layer)
    _hook()


def steps_made() -> int:
    """Return how many steps optimisers have made since the first layer was watched."""
    return _steps_made


@cache
def _hook() -> None:
    """Hook into every optimiser step; a compiled step runs the hooks between its graphs."""
    apart: Any = torch.compiler.disable
    register_optimizer_step_pre_hook(apart(_before))
    register_optimizer_step_post_hook(apart(_after))


@torch.no_grad()
def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Keep θ of the sparse weights for the time of the step."""
    hold_on_to(type(optimizer), _around)
    sparse, steps = watched(), _BEGUN.setdefault(optimizer, Steps())
    if steps.known != enlisted():
        check_apart_from_others(optimizer, sparse)
        steps.known = enlisted()
    found = list(_among(sparse, optimizer))
    for _, weight, theta, _ in found:
        check_whole(theta, weight.rule.name)
    known = _COPIES.pop(optimizer, {})
    held = [
        Held(layer, weight, theta, _copied(theta.detach(), known.get(id(theta))), group)
        for layer, weight, theta, group in found
    ]
    steps.held[steps.running :] = [held]  # without those that a hook has put an end to
    say_what_leaks((h.layer, h.weight) for h in held if not h.weight.steps)
    if isinstance(optimizer, LBFGS):
        _start_anew_after_a_refresh(optimizer, held)


def _around(step: Callable[..., Any], optimizer: Optimizer, *inputs: Any, **options: Any) -> Any:
    """Let an optimiser move weights; where that ends in an error, or hooks may, put them back."""
    if torch.compiler.is_compiling():
        return step(optimizer, *inputs, **options)
    steps = _BEGUN.setdefault(optimizer, Steps())
    steps.running += 1
    finished = False
    try:
        result = step(optimizer, *inputs, **options)
        finished = True
    finally:
        steps.running -= 1
        if steps.held and (not finished or optimizer._optimizer_step_post_hooks):
            _put_back(optimizer, steps.held[-1] if finished else steps.held.pop())
    return result


@torch.no_grad()
def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Count the step, and put back what hooks have moved, too."""
    global _steps_made
    _steps_made += 1
    begun = _BEGUN.get(optimizer)
    held = begun.held.pop() if begun is not None and begun.held else []
    for _, weight, theta, *_ in held:
        weight.steps += theta.grad is not None
        if weight.asked is not None:
            weight.asked.settle()
    _put_back(optimizer, held)
    copied = [h for h in held if h.before.device.type == "cpu"]
    _COPIES[optimizer] = {id(h.theta): h.before for h in copied}
    if late := [h.weight for h in held if h.weight.steps > h.weight.overdue]:
        say_that_it_is_forgotten(late)


@torch.no_grad()
def _put_back(optimizer: Optimizer, held: list[Held]) -> None:
    """Put back what lies outside B, bit for bit, and let slots there be as they begin."""
    for layer, weight, theta, before, group in held:
        inside = weight.backward_bits(layer)
        keep_within(inside, theta, before)
        for name, slot in slots_of(optimizer, theta).items():
            begun = as_it_begins(name, slot, theta, inside, optimizer, group)
            keep_within(inside, slot, begun)


def _copied(theta: Tensor, known: Tensor | None) -> Tensor:
    """Return a copy of θ, in a tensor that is known if that is of its kind."""
    if known is None or dispatches(theta) or _kind(known) != _kind(theta):
        return theta.clone()
    return known.copy_(theta)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _among(
    sparse: Mapping[int, tuple[nn.Module, SparseWeight]], optimizer: Optimizer
) -> Iterator[tuple[nn.Module, SparseWeight, nn.Parameter, Mapping[str, Any]]]:
    """Find sparse weights among the parameters of an optimiser, each once."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in sparse:
                yield *sparse[id(parameter)], parameter, group


def _start_anew_after_a_refresh(optimizer: LBFGS, held: list[Held]) -> None:
    """Forget the history of L-BFGS, one vector over all parameters, once a B has changed."""
    for layer, weight, theta, *_ in held:
        inside = weight.masks(layer).backward
        last = optimizer.state[theta].get("backward_mask", inside)
        if not torch.equal(last.bool(), inside):
            optimizer.state.clear()
            break
    for layer, weight, theta, *_ in held:
        optimizer.state[theta]["backward_mask"] = weight.masks(layer).backward
