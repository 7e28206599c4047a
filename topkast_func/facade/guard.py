"""What a step of any `torch.optim` optimiser may move: nothing outside B."""

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from topkast_func.bits import unpacked
from topkast_func.checks import dispatches
from topkast_func.config import TopKastConfig
from topkast_func.facade.derived import check_whole
from topkast_func.facade.leaks import say_what_leaks
from topkast_func.facade.slots import as_it_begins, slots_of
from topkast_func.facade.sparse_weight import SparseWeight, weights_of
from topkast_func.methods.exchange import Static
from topkast_func.powerprop import phi_is_told_by
from topkast_func.warn import warn_caller


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


_LAYERS: "WeakValueDictionary[int, nn.Module]" = WeakValueDictionary()
_HELD: "WeakKeyDictionary[Optimizer, list[Held]]" = WeakKeyDictionary()
_COPIES: "WeakKeyDictionary[Optimizer, dict[int, Tensor]]" = WeakKeyDictionary()
"""Of its last step, by the id of the parameter, to be written to again on a CPU, where memory that
is new to a process costs four times the copying."""

_steps_made = 0


def watch(layer: nn.Module) -> None:
    """Guard the sparse weights of a layer as long as it lives, whichever optimiser has them.

    The layer is asked for its parameters at each step, so that others may take their place.
    """
    _LAYERS[id(layer)] = layer
    _hook()


def release(layer: nn.Module) -> None:
    """Stop guarding a layer."""
    _LAYERS.pop(id(layer), None)


def watched() -> dict[int, tuple[nn.Module, SparseWeight]]:
    """Return the layers that are watched, and their sparse weights, by the id of the parameter."""
    return {id(weight.raw(layer)): (layer, weight) for layer, weight in all_watched()}


def all_watched() -> list[tuple[nn.Module, SparseWeight]]:
    """Return each layer that is watched with each sparse weight that it has, tied ones too."""
    layers = [layer for ref in _LAYERS.valuerefs() if (layer := ref()) is not None]
    return [
        (layer, weight)
        for layer in layers
        for key, weight in weights_of(layer).items()
        if layer._parameters.get(key) is not None
    ]


@phi_is_told_by
def _phi() -> list[Tensor]:
    """Return the parameters that hold φ, of layers that are watched."""
    return [w.raw(layer) for layer, w in all_watched() if w.rule.config.powerprop > 1.0]


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
    found = list(_sparse_weights_of(optimizer))
    for _, weight, theta, _ in found:
        check_whole(theta, weight.rule.name)
    known = _COPIES.pop(optimizer, {})
    held = [
        Held(layer, weight, theta, _copied(theta.detach(), known.get(id(theta))), group)
        for layer, weight, theta, group in found
    ]
    _HELD[optimizer] = held
    say_what_leaks((h.layer, h.weight) for h in held if not h.weight.steps)
    if isinstance(optimizer, LBFGS):
        _start_anew_after_a_refresh(optimizer, held)


@torch.no_grad()
def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Put back what lies outside B, bit for bit, and let slots there be as they begin."""
    global _steps_made
    _steps_made += 1
    held = _HELD.pop(optimizer, [])
    for layer, weight, theta, before, group in held:
        weight.steps += theta.grad is not None
        inside = weight.backward_bits(layer)
        _keep_within(inside, theta, before)
        for name, slot in slots_of(optimizer, theta).items():
            begun = as_it_begins(name, slot, theta, inside, optimizer, group)
            _keep_within(inside, slot, begun)
    _COPIES[optimizer] = {id(h.theta): h.before for h in held if h.before.device.type == "cpu"}
    if late := [h.weight for h in held if h.weight.steps > h.weight.overdue]:
        _say_that_it_is_forgotten(late)


def _copied(theta: Tensor, known: Tensor | None) -> Tensor:
    """Return a copy of θ, in a tensor that is known if that is of its kind."""
    if known is None or dispatches(theta) or _kind(known) != _kind(theta):
        return theta.clone()
    return known.copy_(theta)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _keep_within(bits: Tensor, tensor: Tensor, elsewhere: Tensor | None) -> None:
    """Leave the entries that bits mark, and put back what others were; None for 0."""
    fast = tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)
    if fast and tensor.is_contiguous() and not dispatches(tensor):
        from topkast_func.kernels.within import keep_within

        keep_within(bits, tensor, elsewhere)
    else:
        others = 0.0 if elsewhere is None else elsewhere
        tensor.copy_(torch.where(unpacked(bits, tensor.shape), tensor, others))


def patience(config: TopKastConfig, step: int) -> float:
    """Return how many steps of an optimiser may go by before it is said that nobody counts them.

    Twice as many as there are between refreshes, at the least a few: an optimiser may wrap
    another, and both are heard of. Without refreshes nothing is amiss.
    """
    every = config.schedule.interval(step)
    stay = config.schedule.settled(step) or isinstance(config.method, Static)
    return math.inf if every is None or stay else max(2 * every, 10)


def _say_that_it_is_forgotten(late: list[SparseWeight]) -> None:
    for weight in late:
        weight.overdue = math.inf
    warn_caller(
        "the optimizer goes on and nobody calls sparsifier.step(): the sets are never chosen anew. "
        "Call it once after each optimizer.step(), or give the trainer its TopKastCallback; "
        "refresh_every=None leaves the sets to sparsifier.refresh()"
    )


def _sparse_weights_of(
    optimizer: Optimizer,
) -> Iterator[tuple[nn.Module, SparseWeight, nn.Parameter, Mapping[str, Any]]]:
    """Find the sparse weights among the parameters of an optimiser, each once."""
    found = watched()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in found:
                yield *found[id(parameter)], parameter, group


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
