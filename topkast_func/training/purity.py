"""A trial of the forward pass, which must have no side effects."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only

from topkast_func.model.modules import bind, ties, unset_buffers
from topkast_func.training.loss import loss_and_aux
from topkast_func.training.random_numbers import random_numbers_of
from topkast_func.training.state import TrainState, alpha_in
from topkast_func.types import LossFn, Model

HOOKS = (
    "the step does not differentiate through torch.utils.checkpoint, nor through other hooks on "
    "saved tensors: take it out of the model (model.gradient_checkpointing_disable() where that "
    "is of Hugging Face), or train in an ordinary loop, by tk.sparsify"
)

UNSEEN = (
    "the loss does not depend on what is trained: call the model through apply: model(x) has the "
    "original weights; and detach nothing, nor compute under torch.no_grad(), on the way to it"
)


@torch.enable_grad()
def check_pure(model: Model, loss_fn: LossFn, state: TrainState, batch: Any) -> None:
    """Try the forward pass on copies: a compiled step would write changes into the state.

    Args:
        model: A module, or a pure function ``apply(params, *inputs)``.
        loss_fn: ``loss_fn(apply, batch)``.
        state: The state; it is not written to.
        batch: Whatever ``loss_fn`` takes; nor is it.

    Raises:
        ValueError: It changes a parameter or its inputs, gives a buffer another shape, or sets
            one that was None; or the loss does not depend on what is trained.
        RuntimeError: It uses `torch.utils.checkpoint`. What else is wrong with it is for the step
            to say.
    """
    batch = tree_map_only(Tensor, torch.clone, batch)
    before, unset = alpha_in(state), unset_buffers(model)
    trained = {name: before[name].detach().requires_grad_() for name in state.weights.shapes()}
    weights = {name: tensor.clone() for name, tensor in {**before, **trained}.items()}
    held, loss = dict(weights), None
    with random_numbers_of(state), _only_of_hooks():
        loss, _ = loss_and_aux(loss_fn(bind(model, ties(model), weights, {}, held), batch))
    same = partial(torch.allclose, rtol=0.0, atol=0.0, equal_nan=True)
    written = {name: held.pop(name) for name in state.buffers}
    if changed := [
        name
        for name, now in held.items()
        if now is not weights[name] or now._version or not same(now, before[name])
    ]:
        raise ValueError(
            f"the forward pass changes parameters {changed}: use the result of the change, or "
            "register what changes as a buffer"
        )
    if any(leaf._version for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)):
        raise ValueError("the forward pass or loss_fn changes its inputs in place: copy them first")
    if reshaped := [n for n, b in written.items() if b.shape != before[n].shape]:
        raise ValueError(f"the forward pass gives buffers {reshaped} another shape")
    found = unset_buffers(model)
    if newly_set := [name for name in unset if name not in found]:
        for module, key in (unset[name] for name in newly_set):
            module._buffers[key] = None
        raise ValueError(
            f"the forward pass sets buffers {newly_set} that were None: register them as tensors"
        )
    if isinstance(loss, Tensor) and not _depends_on(loss, trained.values()):
        raise ValueError(UNSEEN)


@contextmanager
def _only_of_hooks() -> Iterator[None]:
    """Raise an error of hooks on saved tensors, which `torch.func` does not take, and no other."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(HOOKS):
            yield
    except Exception as reason:
        if str(reason) == HOOKS:
            raise RuntimeError(HOOKS) from None


def _depends_on(loss: Tensor, leaves: Iterable[Tensor]) -> bool:
    """Return whether a leaf is in the graph of a loss, whatever the gradient is."""
    ends = {get_gradient_edge(leaf).node for leaf in leaves}
    met: set[Node | None] = {None}
    ahead: set[Any] = {loss.grad_fn}
    while ahead := ahead - met:
        if ends & ahead:
            return True
        met |= ahead
        ahead = {node for behind in ahead for node, _ in behind.next_functions}
    return False
