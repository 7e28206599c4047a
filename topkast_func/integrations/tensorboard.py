"""Losses and refreshes for TensorBoard, an optional extra."""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from topkast_func.checks import check_count
from topkast_func.files.drafts import path_of
from topkast_func.report.flops import TrainingFlops
from topkast_func.report.history import History
from topkast_func.training.loop import Callback
from topkast_func.training.metrics import StepMetrics
from topkast_func.training.state import TrainState


class TensorBoardLogger(Callback):
    """Writes what happens to TensorBoard.

    Losses go to ``loss/…``; for each refresh churn and promotions go to ``churn/NAME`` and
    ``promoted/NAME``, the exploration rate to ``exploration_rate``, and operations over those
    of the dense model to ``flops/ratio``.

    Args:
        folder: Where the event files go.
        every: Steps between two losses that are written, at least 1.
        flops: Counts the operations of a step; see `History`.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every: int = 1,
        flops: Callable[[TrainState], TrainingFlops] | None = None,
    ) -> None:
        self.every = check_count("every", every, 1)
        try:
            module: Any = import_module("torch.utils.tensorboard")
        except ImportError as reason:
            raise ImportError(
                f"no TensorBoard ({reason}): pip install 'topkast_func[tensorboard]'"
            ) from reason
        self.writer = module.SummaryWriter(str(path_of("folder", folder)))
        self._history = History(flops)

    def on_step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Write the losses and the norm of the gradient."""
        step = int(state.step) - 1
        if step % self.every == 0:
            for name in ("loss", "data_loss", "penalty"):
                self.writer.add_scalar(f"loss/{name}", float(getattr(metrics, name)), step)
            self.writer.add_scalar("grad_norm", float(metrics.grad_norm), step)

    def on_refresh(self, before: TrainState, after: TrainState) -> None:
        """Write what changed."""
        self._history.on_refresh(before, after)
        refresh = self._history.refreshes[-1]
        self.writer.add_scalar("exploration_rate", refresh.exploration_rate, refresh.step)
        if refresh.flops:
            self.writer.add_scalar("flops/ratio", refresh.flops.ratio, refresh.step)
        for name, exchange in refresh.exchanges.items():
            self.writer.add_scalar(f"churn/{name}", exchange.churn, refresh.step)
            self.writer.add_scalar(f"promoted/{name}", exchange.promoted, refresh.step)

    def close(self) -> None:
        """Write what is left, and close the files."""
        self.writer.close()
