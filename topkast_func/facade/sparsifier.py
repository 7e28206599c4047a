"""The schedule of a module that was made sparse in place: refreshes, penalty, what is resumed."""

import math
import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from topkast_func.checks import check_count, check_number
from topkast_func.config import TopKastConfig
from topkast_func.facade.fixed import Fixed
from topkast_func.facade.loading import POWERPROP
from topkast_func.facade.owners import (
    Owners,
    are_of_stage,
    check_stage,
    claimed,
    first,
    follow,
    named_now,
    owners_of,
    parameters_of,
    summary_of,
)
from topkast_func.facade.patience import patience
from topkast_func.facade.penalty import penalty_of
from topkast_func.facade.probes import ask_for_gradients, gradients_asked_for
from topkast_func.facade.progress import Progress, held_by
from topkast_func.facade.room import whole
from topkast_func.facade.sparse_weight import SparseWeight
from topkast_func.facade.within import check_alike, summed
from topkast_func.ranking import NaNParameterError
from topkast_func.reading import check_numbers
from topkast_func.report.summary import Summary
from topkast_func.training.refresh import chosen_anew
from topkast_func.types import Masks, Tensors


class Sparsifier(Fixed):
    """Keeps the schedule of a module that `sparsify` has made sparse.

    The module holds all else: θ in its parameters, A and B in its buffers.

    `torch.optim.LBFGS` is to have ``line_search_fn="strong_wolfe"``, or B to be A: on B∖A the
    gradient is that of no function of θ, of which it would estimate the curvature, and diverge.

    Args:
        model: The module.
        config: The configuration.
        seed: Seed of the methods that draw, at least 0.
    """

    def __init__(self, model: nn.Module, config: TopKastConfig, seed: int = 0) -> None:
        self._model, self._config, self._steps = model, config, 0
        self._seed = check_count("seed", seed, 0)
        self._patience, self._mark, self._loaded = patience(config, 0), claimed(model), False
        self._progress, self._alike = Progress(self._owners()), False
        if config.schedule.refreshes_at(0):
            self.refresh()
        self._ask_for_gradients()

    def step(self) -> bool:
        """Count a step of the optimiser, and choose the sets anew where that is due.

        To be called once after each ``optimizer.step()``. Where θ holds NaN, or a gradient that is
        read is not finite, the sets stay, and a warning says so.

        Returns:
            Whether the sets were chosen anew.

        Raises:
            RuntimeError: No backward pass has reached the sparse weights since the last call, the
                optimiser that made a step has none of them, the model is dense again, or its sparse
                weights are not those that were made sparse; nothing has changed. Or see `refresh`.
            torch.OutOfMemoryError: See `refresh`.
        """
        owners = self._owners()
        if not owners and self.config.method.sparsifies:
            raise RuntimeError("model has no sparse weights any more: it was densified")
        self._progress.check(owners)
        self._alike = self._alike or check_alike(owners, self.steps)
        behind, self._loaded, self._patience = self._is_behind(), False, math.inf
        self._steps += 1
        if due := behind or self.config.schedule.refreshes_at(self.steps):
            try:
                self.refresh()
            except NaNParameterError as reason:
                warnings.warn(f"no refresh before step {self.steps}: {reason}", stacklevel=2)
                due = False
            except RuntimeError:  # no gradient, say, or too little memory
                self._steps, self._loaded = self._steps - 1, behind
                self._progress.undo()
                raise
        self._ask_for_gradients()
        return due

    def refresh(self) -> None:
        """Choose A and B anew now, whether that is due or not.

        A weight that requires no gradient (any more) keeps its A, and all of θ. A collective call
        under DistributedDataParallel.

        Raises:
            RuntimeError: The method reads the gradient at α of all entries, and there is none;
                the sparse weights are not those that were made sparse; their sets were loaded
                from another stage of the schedule without `load_state_dict`; nothing has changed.
                Or ranks of DistributedDataParallel have other sets, or one is lost.
            NaNParameterError: A sparse weight holds NaN, or a gradient that is read is not finite;
                nothing has changed.
            torch.OutOfMemoryError: The device has too little memory; nothing has changed, and what
                was called can be called again.
        """
        check_numbers("a refresh")
        check_stage(owners := self._owners())
        trained = parameters_of(owners)
        raw = {name: parameter.detach() for name, parameter in trained.items()}
        exponent = torch.tensor(self.config.powerprop, dtype=torch.float64, device="cpu")
        with whole(owners):
            chosen, masks = chosen_anew(
                raw,
                raw,
                lambda: _masks(first(owners)),
                self.config,
                step=self.steps,
                seed=self.seed,
                exponents=dict.fromkeys(raw, exponent) if self.config.powerprop > 1.0 else None,
                gradients=self._gradients(),
            )
            follow(self._owners(), self.config, self.steps, self.seed)
            settled = self.config.schedule.settled(self.steps)
            taken = [name for name in owners if trained[name].requires_grad or settled]
            for name in taken:
                for layer, weight in owners[name]:
                    weight.hold(layer, masks[name])
        for name in taken:
            if chosen[name] is not raw[name]:
                raw[name].copy_(chosen[name])
        check_alike(self._owners(), self.steps)

    def penalty(self) -> Tensor:
        """Return the exploration penalty with its weight λ, 0-d, to be added to the loss as it is.

        (``metrics.penalty`` of a step of `make_train_step` is without λ.) It can be differentiated
        where it is 0 too, for a method that does not explore say.
        """
        return penalty_of(self._owners(), self.model, self.config, self.steps)

    def penalize(self, optimizer: Optimizer, scale: float = 1.0) -> bool:
        """Add the gradient of the penalty to that of the loss, for loops whose loss is without it.

        Args:
            optimizer: Whose step comes next; the gradients of its parameters alone are added to.
            scale: What the loss is multiplied by before its gradient is taken, by a
                `torch.amp.GradScaler` say.

        Returns:
            Whether the optimiser has sparse weights that are trained, or other parameters of the
            module where there are none, so that its step is to be counted.

        Raises:
            TypeError: It is no optimiser, or ``scale`` no number.
            ValueError: ``scale`` is negative, NaN or infinite.
        """
        held, scale = held_by(optimizer), check_number("scale", scale, 0.0)
        trained = [p for p in parameters_of(self._owners()).values() if p.requires_grad]
        raw = [p for p in trained if id(p) in held]
        with torch.inference_mode(False), torch.enable_grad():  # as where gradients are clipped
            penalty = scale * self.penalty()
            if raw and penalty.requires_grad:
                torch.autograd.backward(penalty, inputs=raw)
        return not held.isdisjoint(map(id, trained or self.model.parameters()))

    def dense_params(self) -> Tensors:
        """Return copies of θ of all parameters by name, that of powerpropagation too."""
        owners = named_now(self.model, self._owners())
        sparse = {name: weight.theta(layer) for name, (layer, weight) in owners.items()}
        found = dict(self.model.named_parameters()) | sparse
        return {name: theta.detach().clone() for name, theta in found.items()}

    def masks(self) -> dict[str, Masks]:
        """Return A and B of the sparse weights, by the names that they have in the module now."""
        return _masks(named_now(self.model, self._owners()))

    def summary(self) -> Summary:
        """Describe what the module consists of, one row for each parameter."""
        return summary_of(self.model, self.config, self._owners())

    def state_dict(self) -> dict[str, float]:
        """Return step, seed and ``powerprop``; the rest is in the module's state dict."""
        return {"steps": self.steps, "seed": self.seed, POWERPROP: self.config.powerprop}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run was; the module's state dict is to be loaded too.

        Args:
            state: What `state_dict` returned.

        Raises:
            TypeError: The values are no integers.
            ValueError: These are not the keys, a number is out of range, or powerprop is another.
        """
        if state.keys() - {POWERPROP} != {"steps", "seed"}:
            raise ValueError(f"state must have the keys 'steps' and 'seed', got {sorted(state)}")
        if (other := state.get(POWERPROP, self.config.powerprop)) != self.config.powerprop:
            raise ValueError(
                f"state is of a run of powerprop={other}, this is of {self.config.powerprop}"
            )
        steps, seed = (check_count(name, state[name], 0) for name in ("steps", "seed"))
        for _, weight in chain.from_iterable(self._owners().values()):
            weight.given = None
        self._steps, self._seed, self._loaded = steps, seed, True
        self._patience = patience(self.config, steps)
        follow(self._owners(), self.config, steps, seed)
        self._ask_for_gradients()

    def _owners(self) -> Owners:
        return owners_of(self.model, self._mark)

    def _is_behind(self) -> bool:
        """Return whether the sets that stand with what was loaded are of another stage."""
        return self._loaded and not are_of_stage(self._owners(), self.config, self.steps)

    @torch.inference_mode(False)
    def _ask_for_gradients(self) -> None:
        """Let the next step leave the gradient of every entry, if a refresh then reads it."""
        method, by_hand = self.config.method, self.config.refresh_every is None
        asked = method.reads_gradient and (
            by_hand or self.config.schedule.refreshes_at(self.steps + 1) or self._is_behind()
        )
        owners = self._owners()
        ask_for_gradients(owners, asked)
        for _, weight in chain.from_iterable(owners.values()):
            weight.overdue = weight.steps + self._patience

    def _gradients(self) -> Tensors | None:
        """Return the gradients that the method reads, summed over the processes."""
        if not self.config.method.reads_gradient or self.config.schedule.settled(self.steps):
            return None
        owners = self._owners()
        return summed(owners, gradients_asked_for(owners, self.config.method))


def _masks(owners: Mapping[str, tuple[nn.Module, SparseWeight]]) -> dict[str, Masks]:
    return {name: weight.masks(layer) for name, (layer, weight) in owners.items()}
