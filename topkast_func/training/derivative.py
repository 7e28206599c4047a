"""The gradient of a function of tensors by name."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.func import grad_and_value
from torch.utils._pytree import tree_map_only

from topkast_func.reading import plain
from topkast_func.types import Tensors

HOOKS = (
    "the step does not differentiate through torch.utils.checkpoint, nor through other hooks on "
    "saved tensors: take it out of the model (model.gradient_checkpointing_disable() where that "
    "is of Hugging Face), or train in an ordinary loop, by tk.sparsify"
)


def without_hooks() -> AbstractContextManager[None]:
    """Refuse hooks on saved tensors, which would compute with the weights that a module has."""
    return disable_saved_tensors_hooks(HOOKS)


def gradient_and_value(
    objective: Callable[[Tensors], tuple[Tensor, Any]], values: Tensors
) -> tuple[Tensors, tuple[Tensor, Any]]:
    """Return the gradient of a function, and what it returned.

    `torch.func` serves where a graph is traced and within its own transforms; elsewhere autograd
    by itself, which spends a third of the time of a small eager step less on each operation.

    Args:
        objective: It returns a 0-d tensor, whose gradient it is, and a tree of anything else.
        values: What it takes; they are not written to.

    Returns:
        Gradients by name, zero where the function does not depend on a value, and the pair, which
        autograd follows no further; all plain tensors, whatever kind a batch is of.
    """
    if torch.compiler.is_compiling() or peek_interpreter_stack() is not None:
        traced: tuple[Tensors, tuple[Tensor, Any]] = grad_and_value(objective, has_aux=True)(values)
        return traced
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    with torch.enable_grad(), without_hooks():
        loss, beside = tree_map_only(Tensor, plain, objective(leaves))
    if not loss.requires_grad:
        return {name: torch.zeros_like(value) for name, value in values.items()}, (loss, beside)
    found = torch.autograd.grad(loss, tuple(leaves.values()), materialize_grads=True)
    gradients = dict(zip(leaves, found, strict=True))
    return gradients, tree_map_only(Tensor, Tensor.detach, (loss, beside))
