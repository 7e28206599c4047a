"""What the callbacks for other people's trainers have in common."""

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from topkast_func.checks import check_type
from topkast_func.facade import Sparsifier, densify
from topkast_func.facade.progress import held_by
from topkast_func.facade.sparse_weight import weights_of

RESUMED = (
    ". The checkpoint is of a sparse run, with θ and its sets: sparsify the model with the same "
    "config, and resume then"
)


class Hosted:
    """Mixed into a callback: holds a sparsifier, and knows how a training begins and ends.

    Args:
        sparsifier: What `sparsify` returned.
        densify_at_end: Whether the model becomes plain at the end.
        name: What tells it from another of the same training.

    Raises:
        TypeError: The first argument is no sparsifier, or the name no text.
    """

    def __init__(self, sparsifier: Sparsifier, densify_at_end: bool = True, name: str = "") -> None:
        if not isinstance(sparsifier, Sparsifier):
            raise TypeError(
                "sparsifier must be what tk.sparsify(model, config) returns, got "
                f"{type(sparsifier).__name__}"
            )
        check_type("name", name, str)
        self.sparsifier, self.densify_at_end, self.name = sparsifier, densify_at_end, name

    def _begin(
        self, model: nn.Module, optimizers: Iterable[Optimizer], resumed: bool = False
    ) -> None:
        """Refuse to train what is not sparse, or with optimisers that leave it alone."""
        if not self.sparsifier.config.method.sparsifies:
            return
        sparse = {
            id(raw := weight.raw(layer)): raw
            for layer in self.sparsifier.model.modules()
            for weight in weights_of(layer).values()
        }
        if not sparse or not sparse.keys() <= set(map(id, model.parameters())):
            raise ValueError(
                "model was never sparsified, has been densified, or is not that of the sparsifier: "
                "call tk.sparsify(model, config) on the module that is trained, and give "
                f"the callback what it returns{RESUMED if resumed else ''}"
            )
        trained = {key for key, raw in sparse.items() if raw.requires_grad}
        held = set[int]().union(*map(held_by, optimizers))
        if trained and trained.isdisjoint(held):
            raise ValueError(
                "the optimizer holds none of the sparse weights: build it from model.parameters()"
            )

    def _check_alone(self, others: Iterable[object]) -> None:
        """Refuse a sparsifier that another callback of the training has."""
        if any(self is not o and self.sparsifier is getattr(o, "sparsifier", None) for o in others):
            raise ValueError("two callbacks have one sparsifier: it would count each step twice")

    def _end(self) -> None:
        """Leave a plain model, unless it is plain or to be trained on."""
        if self.densify_at_end and self.sparsifier.config.method.sparsifies:
            densify(self.sparsifier.model)
