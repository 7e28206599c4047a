"""Data parallel: what a step does beside its own work where several processes share a batch."""

import hashlib
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from topkast_func.distributed import checksums
from topkast_func.distributed.batches import Samples, filled
from topkast_func.distributed.bucket import mean_over
from topkast_func.distributed.models import is_mean
from topkast_func.distributed.ranks import Ranks
from topkast_func.types import LossFn, Tensors

Result = TypeVar("Result")

BROKEN = (
    "a rank that catches an error of train_step cannot go on without the others: end the process, "
    "and begin again on all ranks, from a checkpoint"
)


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
        self._failed: int | None = None
        self._last: list[weakref.ref[Tensor]] = []

    def fed(self, loss_fn: LossFn) -> LossFn:
        """Return a loss function that sees rows of zeros where the batch has none."""

        def fed(apply: Callable[..., Any], batch: Any) -> Any:
            return loss_fn(apply, filled(batch))

        return fed

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
        numbers = [i for i, leaf in enumerate(leaves) if leaf.ndim == 0 and is_mean(leaf)]
        changes = [
            torch.where(after[name] == before[name], 0.0, after[name] - before[name])
            for name in self._averaged
        ]
        sent = [loss, *(leaves[i] for i in numbers), *changes, *grads.values()]
        means = mean_over(self.ranks.group, share.reshape(()), sent)
        for i, number in zip(numbers, means[1:], strict=False):
            leaves[i] = number
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
            raise RuntimeError(
                f"rank {self.rank} of {self.ranks.size}, step {step}: {told}; {BROKEN}"
            )
        self._failed = step
        with self.ranks.waiting(f"in step {step}"):
            samples = self._roll(state, batch, compared, kind | {"due": due})
            self.share = (samples[self.rank] / samples.sum()).reshape(1)
            after, result = run()
        self._failed, self._last = None, [weakref.ref(leaf) for leaf in tree_leaves(after)]
        return after, result

    def _roll(
        self,
        state: Any,
        batch: Any,
        compared: Callable[[], Any],
        kind: dict[str, object],
    ) -> Tensor:
        """Check that the ranks are about to do the same, and return the samples of each."""
        step, leaves = int(state.step), tree_leaves(state)
        kind |= {"tensors in the state": len(leaves)}
        doing = [step, int(state.optimizer.step), _digest(kind)]
        check = kind["due"] or self._are_others(leaves)
        samples = torch.tensor([float(self._samples(batch))], dtype=torch.float64, device="cpu")
        own = torch.tensor([*doing, check, *samples.view(torch.int64)], device="cpu")
        *told, checks, weights = self.ranks.gathered(own).unbind(1)
        where = f"rank {self.rank} of {self.ranks.size}, step {step}"
        for what, numbers in zip(("step", "call of the optimiser"), told, strict=False):
            if (numbers != numbers[0]).any():
                raise RuntimeError(f"{where}: the ranks are at {what} {numbers.tolist()}; {BROKEN}")
        if (told[-1] != told[-1][0]).any():
            self.ranks.check_alike(kind, f"in step {step}")
        if checks.any():
            checksums.check_same(self.ranks, where, compared())
        counts = weights.view(torch.float64)
        if not ((counts >= 0).all() and 0 < counts.sum() < math.inf):
            raise ValueError(
                f"{where}: the ranks have {counts.tolist()} samples: numbers of at least 0 are "
                "asked for, and one above"
            )
        return counts

    def _are_others(self, leaves: list[Tensor]) -> bool:
        """Return whether a state is another than the last step left."""
        known = [last() for last in self._last]
        return len(leaves) != len(known) or any(
            leaf is not last for leaf, last in zip(leaves, known, strict=True)
        )


def _digest(value: Mapping[str, object]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")
