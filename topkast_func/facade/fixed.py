"""What a sparsifier tells of itself, which nobody sets: the module would not follow."""

from typing import Any

from torch import nn

from topkast_func.config import TopKastConfig

LOAD = "load_state_dict({'steps': …, 'seed': …}) sets it"
WAYS = {
    "config": (
        "theta = sparsifier.dense_params(), tk.densify the model, let it load theta by "
        "load_state_dict(theta, strict=False), and sparsify it with the other configuration"
    ),
    "model": "tk.sparsify that model, which returns a sparsifier of its own",
    "seed": LOAD,
    "steps": LOAD,
}


class Fixed:
    """Has attributes that are told, and are set by its own class alone, through ``vars``."""

    model: nn.Module
    config: TopKastConfig
    seed: int
    steps: int

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute that is none of these.

        Raises:
            AttributeError: It is one; nothing has changed.
        """
        if name in WAYS:
            raise AttributeError(f"sparsifier.{name} is not to be set: {WAYS[name]}")
        super().__setattr__(name, value)
