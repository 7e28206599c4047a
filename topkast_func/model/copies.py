"""Copies of modules, whatever their forward passes have left in them."""

import copy
from typing import TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Module = TypeVar("Module", bound=nn.Module)


def copy_of(model: Module) -> Module:
    """Copy a module; of a tensor that it keeps from a forward pass, the numbers.

    Args:
        model: The module.

    Returns:
        The copy. `copy.deepcopy` alone raises RuntimeError where a module keeps a tensor that is no
        leaf of its graph, such as an activation, or a weight that `torch.nn.utils.prune` computes.
    """
    held = (leaf for part in model.modules() for leaf in tree_leaves(vars(part)))
    kept = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    return copy.deepcopy(model, kept)
