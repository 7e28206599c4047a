"""Whether what a loop counts as a step has trained the sparse weights."""

from typing import Any

from torch import Tensor, nn

from topkast_func.facade.guard import steps_made
from topkast_func.facade.owners import Owners, first
from topkast_func.facade.sparse_weight import SparseWeight


class Progress:
    """Notes backward passes and steps of optimisers, from one step that is counted to the next.

    Args:
        owners: The sparse weights.
    """

    def __init__(self, owners: Owners) -> None:
        self._follow(owners)
        self._reached, self._optimized, self._others = False, 0, steps_made()

    def check(self, owners: Owners) -> None:
        """Check that there has been a step of training since the last call.

        Args:
            owners: The sparse weights.

        Raises:
            RuntimeError: No backward pass has reached them, or the optimiser that made a step has
                none of them.
        """
        self._reached |= self._follow(owners)
        held = [weight.raw(layer) for layer, weight in first(owners).values()]
        trained = [p for p in held if p.requires_grad]
        optimized = sum(w.steps for several in owners.values() for _, w in several)
        if trained and not self._reached and optimized == self._optimized:
            raise RuntimeError(
                "no backward pass has reached a sparse weight since the last step(): call "
                "loss.backward() and optimizer.step() first"
            )
        others_only = not optimized and steps_made() > self._others
        if trained and others_only and not _overflown(trained):
            raise RuntimeError(
                "the optimizer that has made a step holds none of the sparse weights: build it "
                "from model.parameters()"
            )
        self._reached, self._optimized = False, optimized

    def _follow(self, owners: Owners) -> bool:
        """Hook into backward passes, of copies too; return whether one may have been missed."""
        found = False
        for layer, weight in first(owners).values():
            raw: Any = weight.raw(layer)
            if not raw.requires_grad or _is_hooked(raw, weight):
                continue
            if weight.hook is not None:
                weight.hook.remove()
            weight.hook = raw.register_post_accumulate_grad_hook(self._note_backward)
            found = True
        return found

    def _note_backward(self, parameter: Tensor) -> None:
        self._reached = True


def _is_hooked(raw: nn.Parameter, weight: SparseWeight) -> bool:
    """Return whether a parameter has the hook of a weight."""
    return weight.hook is not None and weight.hook.id in (raw._post_accumulate_grad_hooks or ())


def _overflown(trained: list[nn.Parameter]) -> bool:
    """Return whether a gradient is not finite, for which a scaler leaves the step out."""
    return any(p.grad is not None and not p.grad.isfinite().all() for p in trained)
