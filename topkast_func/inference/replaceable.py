"""Which layers may be replaced."""

from collections.abc import Collection

from torch import nn

from topkast_func.model.stand_in import calls_its_own

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def replaceable(layer: nn.Module, kinds: Collection[type[nn.Module]]) -> bool:
    """Return whether a layer does what its class does, and nothing else.

    Args:
        layer: The layer.
        kinds: The classes that it may be of; one derived from them may do more, or be asked for
            more, than they are.

    Returns:
        Whether it is of one of them, without hooks, and without methods of its own by which it
        computes.
    """
    own = "forward" in vars(layer) or calls_its_own(layer)
    return type(layer) in kinds and not own and not any(getattr(layer, hooks) for hooks in HOOKS)
