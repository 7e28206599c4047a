"""The seed's training loop: refreshes by epoch, early stopping, the best network kept."""

from collections.abc import Callable, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from topkast_func.checks import check_count, check_type
from topkast_func.facade import fit, observations
from topkast_func.facade.loss import TopKastLoss, loss_of
from topkast_func.model.copies import copy_of
from topkast_func.ranking import NaNParameterError
from topkast_func.warn import warn_caller

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TopKastTrainer:
    """Train a network of `TopKastLinear` (and other) layers with any `torch.optim` optimiser.

    Sets are chosen anew at the start of every epoch while exploring, then at every
    ``update_every``-th epoch. Validation and early stopping measure the loss without penalty
    at α. When training ends, the network has the weights of its best epoch.

    Args:
        net: The network; it is moved to the device and trained in place.
        loss: A `TopKastLoss`, or any loss ``(y_hat, y) -> scalar``, the mean over observations;
            a class such as `torch.nn.MSELoss` is called without arguments.
        num_epochs: Most epochs to train, at least 1.
        print_info_every: Print the losses every so many epochs, at least 1.
        print_loss_history: Print all losses up to the best epoch in the end.
        num_epochs_explore: Epochs that choose sets anew each time, in [0, num_epochs]; None
            for a tenth of num_epochs, at least one.
        update_every: Epochs between two choices after that, at least 1; None for a fifth.
        batch_size: Observations per batch, at least 1; None for a fiftieth of the data.
        train_val_test_split: Fractions that sum to 1; the third may be left out for 0.
        patience: Stop after so many epochs without a better validation loss, at least 1;
            None never stops early.
        optimizer: The optimiser, built from ``net.parameters()``.
        seed: Seed of the split and of the order of the batches.
        data: A map-style data set of pairs (features, target), or one such pair of tensors.
        device: Where to train; None takes the GPU if there is one.
        callbacks: Functions of the trainer, each called after every epoch; one that returns True
            ends the training.

    Attributes:
        losses_train: Mean loss of each epoch's batches without penalty, float64, [epochs run].
        losses_validation: The same of the validation part after each epoch; NaN where that is
            empty (the training loss then decides what is best).
        best_loss: Lowest validation loss.
        best_epoch: Its epoch, from 0.
        best_net: Copy of the network of that epoch; None before training.
        test_loss: What `eval` returned last.

    Raises:
        TypeError: A number is no number, the network no module, the optimiser none of
            `torch.optim`, the data no data set of pairs, or loss or callbacks cannot be called.
        ValueError: Data or optimiser are missing, features and targets are not as many, the
            optimiser is one of another network, the network was made sparse by `sparsify`, or made
            under `torch.inference_mode`, the split does not sum to 1 or leaves no training data, a
            number is out of range, or network or device hold no values.

    Departures:
        The seed's losses carry the penalty, and its training loss is divided by the batch
        size once more. Targets get shape and dtype of an output of as many entries alone, so
        that class indices stay as they are.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        net: nn.Module,
        loss: Callable[..., Any],
        num_epochs: int = 50,
        print_info_every: int = 10,
        print_loss_history: bool = False,
        num_epochs_explore: int | None = None,
        update_every: int | None = None,
        batch_size: int | None = None,
        train_val_test_split: Sequence[float] = (0.7, 0.2, 0.1),
        patience: int | None = None,
        optimizer: Optimizer | None = None,
        seed: int = 42,
        data: "Dataset[Any] | tuple[Tensor, Tensor] | None" = None,
        device: torch.device | str | None = None,
        *,
        callbacks: "Sequence[Callable[[TopKastTrainer], bool | None]]" = (),
    ) -> None:
        data = observations.data_set("data", data)
        self.optimizer = fit.check_fit(optimizer, net)
        self.num_epochs = check_count("num_epochs", num_epochs, 1)
        self.print_info_every = check_count("print_info_every", print_info_every, 1)
        self.print_loss_history = print_loss_history
        self.num_epochs_explore = fit.explored(num_epochs_explore, num_epochs)
        self.update_every = fit.count_or("update_every", update_every, num_epochs // 5)
        self.patience = fit.count_or("patience", patience, num_epochs)
        self.batch_size = fit.count_or("batch_size", batch_size, len(data) // 50)  # type: ignore[arg-type]
        generator = torch.Generator("cpu").manual_seed(check_count("seed", seed, 0))
        parts = observations.split(data, train_val_test_split, generator)
        self.train_dataset, self.validation_dataset, self.test_dataset = parts
        self.train_loader = DataLoader(parts[0], self.batch_size, True, generator=generator)
        self.loss = loss_of(loss)
        self.data_loss = self.loss.loss if isinstance(self.loss, TopKastLoss) else self.loss
        fit.check_callbacks(callbacks)
        self.callbacks, self.device = callbacks, fit.device_of(device)
        self.net = net.to(self.device)
        self.losses_train, self.losses_validation = np.zeros(0), np.zeros(0)
        self.best_loss, self.best_epoch = float("inf"), 0
        self.best_net: nn.Module | None = None
        self.test_loss: float | None = None

    @torch.inference_mode(False)
    def train(self) -> None:
        """Train, then give the network the weights of its best epoch.

        It gets them too where an exception ends the training, such as `KeyboardInterrupt`
        (Ctrl-C). A second call goes on where the first ended, from its best epoch. A loss or
        weight that is not finite ends the training with a warning.

        Raises:
            TypeError: An observation is no pair, or the loss no scalar.
            ValueError: The loss does not depend on what is trained.
        """
        try:
            self._train()
        finally:
            self._restore_best()
        if self.print_loss_history:
            print("training loss:", self.losses_train[: self.best_epoch + 1])
            print("validation loss:", self.losses_validation[: self.best_epoch + 1])

    def _train(self) -> None:
        first = len(self.losses_train)
        span = range(first, first + self.num_epochs)
        with tqdm(span, desc="training", unit="epoch") as epochs:
            for epoch in epochs:
                try:
                    self._refresh_when_due(epoch)
                except NaNParameterError as reason:
                    warn_caller(f"training ends before epoch {epoch + 1}: {reason}")
                    break
                train, validation = self._train_epoch(), self._mean_loss(self.validation_dataset)
                self.losses_train = np.append(self.losses_train, train)
                self.losses_validation = np.append(self.losses_validation, validation)
                losses = {"train": f"{train:.4g}", "validation": f"{validation:.4g}"}
                epochs.set_postfix(losses, refresh=False)
                if (epoch + 1) % self.print_info_every == 0:
                    told = f"training loss {train:.6g}, validation loss {validation:.6g}"
                    tqdm.write(f"epoch {epoch + 1}: {told}")
                self._keep_if_best(epoch, validation if len(self.validation_dataset) else train)
                if not isfinite(train):
                    warn_caller(f"training ends: the loss of epoch {epoch + 1} is {train}")
                    break
                stops = [callback(self) for callback in self.callbacks]
                if any(stops) or epoch - max(self.best_epoch, first - 1) >= self.patience:
                    break

    def predict(self, data: Tensor) -> Any:
        """Return the network's output of features [n, ...], in evaluation mode, no gradient.

        Raises:
            TypeError: ``data`` is no tensor.
        """
        check_type("data", data, Tensor, ": torch.as_tensor(data) makes one")
        mode = self.net.training
        self.net.eval()
        try:
            with torch.no_grad():
                return self.net(observations.features_for(self.net, data, self.device))
        finally:
            self.net.train(mode)

    def eval(self, test_data: "Dataset[Any] | tuple[Tensor, Tensor] | None" = None) -> float:
        """Measure the loss without penalty of the trained network (α).

        Args:
            test_data: A data set of pairs (features, target), or one such pair of tensors;
                None for the test part of the data.

        Returns:
            The mean loss.

        Raises:
            TypeError: The data are no data set of pairs.
            ValueError: There are no observations, or features and targets are not as many.
        """
        name = "data" if test_data is None else "test_data"
        chosen: Any = (
            self.test_dataset if test_data is None else observations.data_set(name, test_data)
        )
        if not len(chosen):
            raise ValueError("no observations to evaluate on: the test part is empty")
        self.test_loss = self._mean_loss(chosen, name)
        return self.test_loss

    def plot_loss(self) -> "Figure":
        """Return a figure of training and validation loss over epochs."""
        from topkast_func.report import plots

        return plots.losses(self.losses_train, self.losses_validation)

    def _refresh_when_due(self, epoch: int) -> None:
        if epoch < self.num_epochs_explore or epoch % self.update_every == 0:
            for layer in fit.sparse_layers(self.net):
                layer.update_active_param_set()

    def _train_epoch(self) -> float:
        self.net.train()
        total = 0.0
        for features, target in observations.pairs("data", self.train_loader):
            total += self._train_batch(features, target) * len(target)
        return total / len(self.train_dataset)

    def _train_batch(self, features: Tensor, target: Tensor) -> float:
        features, measured = observations.features_for(self.net, features, self.device), []

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            y_hat = self.net(features)
            y = observations.target_for(y_hat, target, self.device)
            measured.append(self.data_loss(y_hat.detach(), y))
            loss = fit.trainable(self.loss(y_hat, y))
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        self.optimizer.step(closure)  # type: ignore[arg-type]
        return float(measured[0])

    def _mean_loss(self, data: "Dataset[Any]", name: str = "data") -> float:
        def measure(features: Tensor, target: Tensor) -> Tensor:
            y_hat = self.predict(features)
            return self.data_loss(y_hat, observations.target_for(y_hat, target, self.device))

        return observations.mean_of(measure, data, max(self.batch_size, 256), name)

    def _keep_if_best(self, epoch: int, loss: float) -> None:
        if loss < self.best_loss:
            self.best_epoch, self.best_loss = epoch, loss
            self.best_net = copy_of(self.net)

    def _restore_best(self) -> None:
        if self.best_net is not None:
            self.net.load_state_dict(self.best_net.state_dict())
