"""The gradient of the loss at α, dense."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from topkast_func.checks import check_callable
from topkast_func.model.alone import alone_with, as_plain, uncompiled
from topkast_func.model.modules import bind, ties
from topkast_func.training.derivative import gradient_and_value
from topkast_func.training.ensembles import is_mapped, mapped
from topkast_func.training.fits_model import check_tensors
from topkast_func.training.loss import check_loss_fn, loss_and_aux
from topkast_func.training.random_numbers import random_numbers_of
from topkast_func.training.readout import alpha_in
from topkast_func.training.state import TrainState, check_state
from topkast_func.training.trial import check_pure
from topkast_func.turns import RANDOM_NUMBERS
from topkast_func.types import LossFn, Model, Tensors


def dense_gradients(model: Model, loss_fn: LossFn, state: TrainState, batch: Any) -> Tensors:
    """Return the gradient of the loss at α with respect to every entry of the sparse weights.

    It takes the memory and the time of the dense model. `rigl` grows by it. Under `torch.vmap` it
    does so for each member of an ensemble, of states that were stacked, batches, or both.

    Args:
        model: A module, or a pure function ``apply(params, *inputs)``.
        loss_fn: ``loss_fn(apply, batch)`` to a 0-d tensor.
        state: The state; it is not written to.
        batch: Whatever ``loss_fn`` takes.

    Returns:
        Gradients by name, of the shapes of the sparse parameters.

    Raises:
        TypeError: The loss is no 0-d tensor, ``state`` no state, or the model or ``loss_fn``
            cannot be called.
        ValueError: The state is of another model, the loss does not depend on what is trained, or
            the forward pass is not pure.
        RuntimeError: It is differentiated.
    """
    check_state(state)
    check_callable("model", model)
    check_loss_fn(loss_fn, model)
    model, loss_fn = as_plain(model), uncompiled(loss_fn)
    if is_mapped("dense_gradients", (state, batch)):
        ensemble: Tensors = mapped(partial(dense_gradients, model, loss_fn), state, batch)
        return ensemble

    def gradients() -> Tensors:
        if isinstance(model, nn.Module):
            check_tensors(state, model)
        check_pure(model, loss_fn, state, batch)
        with random_numbers_of(state):
            return gradients_of(model, loss_fn)(state, batch)

    return alone_with(model, gradients, RANDOM_NUMBERS)


def gradients_of(model: Model, loss_fn: LossFn) -> Callable[[TrainState, Any], Tensors]:
    """Return a pure function of state and batch that does what `dense_gradients` does.

    Args:
        model: See `dense_gradients`.
        loss_fn: See `dense_gradients`.

    Returns:
        The function.
    """
    tied = ties(model)

    def gradients(state: TrainState, batch: Any) -> Tensors:
        weights = alpha_in(state)

        def objective(sparse: Tensors) -> tuple[Tensor, tuple[()]]:
            written = {name: buffer.clone() for name, buffer in state.buffers.items()}
            apply = bind(model, tied, weights | sparse, {}, written)
            return loss_and_aux(loss_fn(apply, batch))[0], ()

        with torch.no_grad():
            sparse = {name: weights[name] for name in state.weights.sparse_names}
            return gradient_and_value(objective, sparse)[0]

    return gradients
