"""History of a run: its losses, and what each refresh did."""

from collections.abc import Callable
from typing import NamedTuple

from topkast_func.checks import check_callable
from topkast_func.report.exchange import Exchange, exchanges, exploration_rate, explored
from topkast_func.report.flops import TrainingFlops
from topkast_func.training.loop import Callback
from topkast_func.training.metrics import StepMetrics
from topkast_func.training.readout import masks_of
from topkast_func.training.state import TrainState, check_one
from topkast_func.types import Tensors


class Refresh(NamedTuple):
    """Record of one refresh.

    Attributes:
        step: Number of the step that it was part of.
        exchanges: What it did, by parameter.
        exploration_rate: Share of the sparse weights that have ever been in A, fraction.
        flops: Operations of a step with the new sets; None where the history does not count them.
    """

    step: int
    exchanges: dict[str, Exchange]
    exploration_rate: float
    flops: TrainingFlops | None = None


class History(Callback):
    """Keeps the losses of all steps, and what every refresh did.

    Args:
        flops: Counts the operations of a step, such as
            ``lambda state: training_flops(model, state, inputs)``; None to leave them out.

    Attributes:
        losses: Loss of the data at each step.
        refreshes: The record of each refresh.

    Raises:
        TypeError: ``flops`` cannot be called.
    """

    def __init__(self, flops: Callable[[TrainState], TrainingFlops] | None = None) -> None:
        if flops is not None:
            check_callable("flops", flops)
        self._flops = flops
        self.losses: list[float] = []
        self.refreshes: list[Refresh] = []
        self._explored: Tensors = {}

    def on_step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Keep the loss."""
        self.losses.append(float(metrics.data_loss))

    def on_refresh(self, before: TrainState, after: TrainState) -> None:
        """Keep what changed."""
        check_one(before)
        old, new = masks_of(before), masks_of(after)
        self._explored = explored(new, self._explored or explored(old))
        rate = exploration_rate(self._explored)
        flops = self._flops(after) if self._flops else None
        self.refreshes.append(Refresh(int(before.step), exchanges(old, new), rate, flops))
