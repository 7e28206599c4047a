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
    """Tells what its own class alone sets."""

    _model: nn.Module
    _config: TopKastConfig
    _seed: int
    _steps: int

    @property
    def model(self) -> nn.Module:
        """The module."""
        return self._model

    @property
    def config(self) -> TopKastConfig:
        """The configuration."""
        return self._config

    @property
    def seed(self) -> int:
        """Seed of the methods that draw."""
        return self._seed

    @property
    def steps(self) -> int:
        """Number t of the step that comes next, from 0."""
        return self._steps

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute that is none of these.

        Raises:
            AttributeError: It is one; nothing has changed.
        """
        if name in WAYS:
            raise AttributeError(f"sparsifier.{name} is not to be set: {WAYS[name]}")
        super().__setattr__(name, value)
