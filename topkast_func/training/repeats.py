"""Whether a forward pass does the same again: what changes from call to call is in no state."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from topkast_func.warn import warn_caller

Result: TypeAlias = tuple[Tensor, tuple[Any, ...]] | None
"""What a trial comes to: the loss, and what came with it, if anything; None where it failed."""

UNSTEADY = (
    "steps do not follow from state and batch alone, and are not resumed as they would have gone "
    "on: the forward pass or loss_fn {}. Draw random numbers by torch, from its own generator, and "
    "keep what changes from call to call in a buffer of the model"
)
OTHER_LOSS = "gives, called twice, the losses {:.6g} and {:.6g}"
COUNTS = "changes {} of the model at each call"


class Repeats:
    """Runs trials of a forward pass, of which nothing is to be seen afterwards.

    Args:
        model: The model.
    """

    def __init__(self, model: object) -> None:
        self._model = model
        self._counted: set[tuple[str, str]] = set()

    def run(self, trial: Callable[[], Result], twice: bool) -> Result:
        """Try the forward pass, and put back the numbers that count its calls.

        Args:
            trial: The trial.
            twice: Whether to see, and to warn, if it does not do the same again.

        Returns:
            What the first came to.
        """
        before = _numbers(self._model)
        try:
            first = trial()
            if twice:
                self._check_again(first, trial)
            return first
        finally:
            held = _parts(self._model)
            for part, key in self._counted:
                if (part, key) in before:
                    vars(held[part])[key] = before[part, key]
                else:
                    vars(held[part]).pop(key, None)

    def _check_again(self, first: Result, trial: Callable[[], Result]) -> None:
        between = _numbers(self._model)
        second = trial()
        after = _numbers(self._model)
        counted = {place for place, number in after.items() if number != between.get(place)}
        self._counted |= counted
        told = []
        losses = [result[0] for result in (first, second) if result]
        if len(losses) == 2 and not _close(*losses):
            told.append(OTHER_LOSS.format(*map(float, losses)))
        if counted:
            told.append(COUNTS.format(sorted(".".join(filter(None, place)) for place in counted)))
        if told:
            warn_caller(UNSTEADY.format(" and ".join(told)))


def _close(first: Tensor, second: Tensor) -> bool:
    """Return whether two losses differ by no more than the order of sums may make them."""
    rtol = max(1e-5, 2 * torch.finfo(first.dtype).eps)
    return torch.allclose(first, second, rtol=rtol, equal_nan=True)


def _parts(model: object) -> dict[str, nn.Module]:
    return dict(model.named_modules()) if isinstance(model, nn.Module) else {}


def _numbers(model: object) -> dict[tuple[str, str], float]:
    """Return the plain numbers among the attributes of the parts of a module."""
    return {
        (name, key): value
        for name, part in _parts(model).items()
        for key, value in vars(part).items()
        if isinstance(value, (int, float)) and key != "training"
    }
