"""Whether what a loop counts as a step has trained the sparse weights."""

from typing import Any

from torch import Tensor, nn

from topkast_func.facade.guard import steps_made
from topkast_func.facade.owners import Owners, first, parameters_of
from topkast_func.facade.sparse_weight import SparseWeight
from topkast_func.warn import warn_caller

OTHERS = (
    "the optimizer that has made a step has moved none of the sparse weights: build it from "
    "model.parameters(), and call zero_grad() before loss.backward(), not between that and "
    "optimizer.step()"
)
GONE = (
    "{} are sparse no more: their layers were densified, or others were put in their place, which "
    "are dense"
)


NO_OPTIMIZER = (
    "optimizer must be one of torch.optim, whose step comes next, got {}: sparsifier.penalty() "
    "returns the penalty, to be added to a loss"
)


def held_by(optimizer: object) -> set[int]:
    """Return the ids of the parameters of an optimiser.

    Args:
        optimizer: One of torch, or what wraps it.

    Returns:
        The ids.

    Raises:
        TypeError: It is none.
    """
    groups: Any = getattr(optimizer, "param_groups", None)
    if groups is None:
        raise TypeError(NO_OPTIMIZER.format(type(optimizer).__name__))
    return {id(parameter) for group in groups for parameter in group["params"]}


class Progress:
    """Notes backward passes and steps of optimisers, from one step that is counted to the next.

    Args:
        owners: The sparse weights.
    """

    def __init__(self, owners: Owners) -> None:
        self._follow(owners)
        self._reached, self._made = False, steps_made()
        self._steps = dict.fromkeys(owners, 0)

    def check(self, owners: Owners) -> None:
        """Check that there has been a step of training since the last call.

        Args:
            owners: The sparse weights.

        Raises:
            RuntimeError: No backward pass has reached them, or the optimiser that made a step has
                moved none of them, nor has one before; after a step that has, a warning says so.
        """
        self._reached |= self._follow(owners)
        trained = [p for p in parameters_of(owners).values() if p.requires_grad]
        steps = {name: sum(w.steps for _, w in several) for name, several in owners.items()}
        optimized = any(steps[name] > self._steps.get(name, 0) for name in steps)
        if trained and not self._reached and not optimized:
            raise RuntimeError(
                "no backward pass has reached a sparse weight since the last step(): call "
                "loss.backward() and optimizer.step() first; a loop that takes its gradients by "
                "torch.autograd.grad or torch.func is to put them into parameter.grad, and to let "
                "an optimizer move the parameters"
            )
        if trained and not optimized and steps_made() > self._made and not _overflown(trained):
            if not any(steps.values()):
                raise RuntimeError(OTHERS)
            warn_caller(OTHERS)
        if gone := [name for name in self._steps if name not in owners]:
            warn_caller(GONE.format(gone))
        self._reached, self._steps, self._made = False, steps, steps_made()

    def undo(self) -> None:
        """Forget the last check, so that what it was made for can be tried again."""
        self._reached = True

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
