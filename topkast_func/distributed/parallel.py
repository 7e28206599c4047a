"""Data parallel: what a step does beside its own work where several processes share a batch."""

import math
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from topkast_func.distributed import checksums
from topkast_func.distributed.batches import Samples, filled
from topkast_func.distributed.bucket import mean_over
from topkast_func.distributed.numbers import Numbers
from topkast_func.distributed.ranks import Ranks
from topkast_func.distributed.roll import BROKEN, call_roll, digest
from topkast_func.types import LossFn, Tensors

Result = TypeVar("Result")

SELDOM = 100
"""Steps after which ranks compare what they hold where no refresh has had them do so."""


class Found(NamedTuple):
    """What a step finds in a batch.

    Attributes:
        grads: Gradients of the values by name.
        loss: The loss, 0-d.
        aux: What came with it.
        buffers: Buffers by name, as the model left them.
    """

    grads: Tensors
    loss: Tensor
    aux: tuple[Any, ...]
    buffers: Tensors


class Alone:
    """One process: it adds nothing to a step.

    Attributes:
        rank: 0.
        several: Whether there are several.
        share: Fraction of the samples of the step that are this rank's, float64, [1]; None alone.
    """

    rank = 0
    share: Tensor | None = None
    several = False

    def fed(self, loss_fn: LossFn) -> LossFn:
        """Return the loss function as the step is to call it."""
        return loss_fn

    def mean(self, tensors: Tensors) -> Tensors:
        """Return tensors averaged over the samples of the step."""
        return tensors

    def expect(self, mode: Hashable, step: int, beside: tuple[Any, ...] | None) -> None:
        """Let the ranks agree on what a trial has found, before a step that sends it.

        Args:
            mode: Mode of the model.
            step: Number of the step.
            beside: What came with the loss in the trial of a new mode; None where it has failed.
        """

    def agreed(self, aux: tuple[Any, ...], step: int) -> tuple[Any, ...]:
        """Return what came with the loss of a step, once the ranks agree on what that is."""
        return aux

    def take_part(
        self,
        state: Any,
        batch: Any,
        run: Callable[[], tuple[Any, Result]],
        *,
        compared: Callable[[], Any],
        due: bool,
        **kind: object,
    ) -> tuple[Any, Result]:
        """Run a step.

        Args:
            state: The state, with its ``step``.
            batch: The batch of this rank.
            run: The step of this rank.
            compared: ``compared()`` to what of the state all ranks hold alike; see `check_same`.
            due: Whether a refresh is due before or after it.
            **kind: What else must be alike on all ranks, by what it is called.

        Returns:
            What it returns.
        """
        return run()


class DataParallel(Alone):
    """One process of several: see `make_train_step` for what it adds to a step.

    First the ranks call the roll: a row of each, with the number of its step and what it is about
    to send, tells all whether they are to make the same step. So a rank that is elsewhere is an
    error on all, and what is sent within the step has the same sizes everywhere.
    """

    several = True

    def __init__(self, ranks: Ranks, samples: Samples, averaged: tuple[str, ...]) -> None:
        self.ranks, self.rank = ranks, ranks.rank
        self._samples, self._averaged = samples, averaged
        self._numbers = Numbers(ranks)
        self._failed: int | None = None
        self._unchecked = 0
        self._last: list[weakref.ref[Tensor]] = []

    def fed(self, loss_fn: LossFn) -> LossFn:
        """Return a loss function that sees rows of zeros where the batch has none."""

        def fed(apply: Callable[..., Any], batch: Any) -> Any:
            return loss_fn(apply, filled(batch))

        return fed

    def expect(self, mode: Hashable, step: int, beside: tuple[Any, ...] | None) -> None:
        """Let the ranks agree on what a trial has found; see `Alone.expect`."""
        self._numbers.expect(mode, step, beside)

    def agreed(self, aux: tuple[Any, ...], step: int) -> tuple[Any, ...]:
        """Return what came with the loss; see `Alone.agreed`."""
        if self.share is None:
            return aux
        return self._numbers.agreed(aux, step, self.share.reshape(()))

    def mean(self, tensors: Tensors) -> Tensors:
        """Return tensors averaged over the samples of the step."""
        if self.share is None:
            return tensors
        found = mean_over(self.ranks.group, self.share.reshape(()), list(tensors.values()))
        return dict(zip(tensors, found, strict=True))

    def whole(self, share: Tensor, own: Found, before: Tensors) -> Found:
        """Return what the whole batch has, of what the batch of this rank has.

        Args:
            share: Share of this rank, as the step got it.
            own: What was found in the batch of this rank.
            before: Buffers before the step.

        Returns:
            What all batches together have.
        """
        grads, loss, aux, after = own
        leaves, structure = tree_flatten(aux)
        numbers = self._numbers.sent(leaves, loss.device)
        changes = [
            torch.where(after[name] == before[name], 0.0, after[name] - before[name])
            for name in self._averaged
        ]
        sent = [loss, *numbers, *changes, *grads.values()]
        means = mean_over(self.ranks.group, share.reshape(()), sent)
        leaves = self._numbers.put(leaves, means[1 : 1 + len(numbers)])
        moved = means[1 + len(numbers) : len(means) - len(grads)]
        buffers = {n: before[n] + move for n, move in zip(self._averaged, moved, strict=True)}
        grads = dict(zip(grads, means[len(means) - len(grads) :], strict=True))
        return Found(grads, means[0], tree_unflatten(leaves, structure), after | buffers)

    def take_part(
        self,
        state: Any,
        batch: Any,
        run: Callable[[], tuple[Any, Result]],
        *,
        compared: Callable[[], Any],
        due: bool,
        **kind: object,
    ) -> tuple[Any, Result]:
        """Run a step once all ranks are about to make the same; see `Alone.take_part`."""
        step = int(state.step)
        if self._failed is not None:
            told = f"its step {self._failed} failed"
            raise RuntimeError(f"{self._at(step)}: {told}; {BROKEN}")
        self._failed = step
        with self.ranks.waiting(f"in step {step}", fewer=True):
            checks, samples = self._roll(state, batch, kind | {"due": due})
        with self.ranks.waiting(f"in step {step}"):
            self._unchecked = 0 if checks else self._unchecked + 1
            if checks:
                checksums.check_same(self.ranks, self._at(step), compared())
            self.share = (samples[self.rank] / samples.sum()).reshape(1)
            after, result = run()
        self._failed, self._last = None, [weakref.ref(leaf) for leaf in tree_leaves(after)]
        return after, result

    def _at(self, step: int) -> str:
        return f"rank {self.rank} of {self.ranks.size}, step {step}"

    def _roll(self, state: Any, batch: Any, kind: dict[str, object]) -> tuple[bool, Tensor]:
        """Return whether states are to be compared, and the samples of each, of a step of all."""
        step, leaves = int(state.step), tree_leaves(state)
        kind |= {"tensors in the state": len(leaves)}
        check = bool(kind["due"]) or self._unchecked >= SELDOM or self._are_others(leaves)
        samples = torch.tensor([float(self._samples(batch))], dtype=torch.float64, device="cpu")
        own = [int(state.optimizer.step), digest(kind), check, *samples.view(torch.int64)]
        rows = call_roll(self.ranks, f"in step {step}", own)
        calls, kinds, checks, weights = rows.unbind(1)
        if (calls != calls[0]).any():
            told = f"the ranks are at call of the optimiser {calls.tolist()}"
            raise RuntimeError(f"{self._at(step)}: {told}; {BROKEN}")
        if (kinds != kinds[0]).any():
            self.ranks.check_alike(kind, f"in step {step}")
        counts = weights.view(torch.float64)
        if not ((counts >= 0).all() and 0 < counts.sum() < math.inf):
            raise ValueError(
                f"{self._at(step)}: the ranks have {counts.tolist()} samples: numbers of at least "
                "0 are asked for, and one above"
            )
        return bool(checks.any()), counts

    def _are_others(self, leaves: list[Tensor]) -> bool:
        """Return whether a state is another than the last step left."""
        known = [last() for last in self._last]
        return len(leaves) != len(known) or any(
            leaf is not last for leaf, last in zip(leaves, known, strict=True)
        )
