"""The processes of a group: who they are, what each of them says, and what is said of a fault."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from topkast_func.ranking import NaNParameterError

Result = TypeVar("Result")

KINDS = (NaNParameterError, FileNotFoundError, OSError, TypeError, ValueError, RuntimeError)
"""Kinds of errors that all ranks raise where one does."""

LOST = (
    "rank {rank} of {size} waited in vain for {others} {where}: a process has ended or "
    "hangs{fewer} (its own message says which). {reason}"
)
ALONE = (
    "process_group or mesh has rank {} of {} alone, which would train apart from the others: pass "
    "the group of those that train together, or neither for a network of its own"
)
FEWER = ", or has no batch left where it is to give empty ones"


class Ranks:
    """The processes of a group, of which this is one, or this one alone.

    Attributes:
        group: The group; None of this process alone.
        rank: Number of this process in it.
        size: How many there are.

    Raises:
        TypeError: It is no group.
        ValueError: This process is not in it.
    """

    def __init__(self, group: object) -> None:
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group must be one that this process is in")
        if not (group is None or isinstance(group, dist.ProcessGroup)):
            raise TypeError(f"process_group must be a ProcessGroup, got {group!r}")
        self.group, self.rank, self.size = group, 0, 1
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def gathered(self, own: Tensor) -> Tensor:
        """Collect a tensor of the same shape from each.

        Args:
            own: That of this process, [...], on the CPU.

        Returns:
            Those of all, [size, ...], on the CPU.
        """
        if self.size == 1:
            return own[None]
        here = own.to(self._device())
        found = [torch.empty_like(here) for _ in range(self.size)]
        dist.all_gather(found, here, group=self.group)
        return torch.stack(found).cpu()

    def sent(self, rank: int, own: Tensor) -> Tensor:
        """Return a tensor as one rank has it.

        Args:
            rank: That rank.
            own: On that rank the tensor; on others any of its shape, dtype and device, such as one
                without values.

        Returns:
            The tensor.
        """
        if self.group is None:
            return own
        here = own.to(self._device(), copy=True).contiguous()
        dist.broadcast(here, dist.get_global_rank(self.group, rank), self.group)
        return here.to(own.device)

    def reduced(self, own: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        """Return what an operation, such as a sum, makes of a tensor of each rank.

        Args:
            own: That of this rank, of one shape, dtype and device on all.
            operation: The operation.

        Returns:
            The tensor.
        """
        here = own.to(self._device(), copy=True)
        dist.all_reduce(here, operation, self.group)
        return here.to(own.device)

    def told(self, own: Any) -> list[Any]:
        """Collect an object from each process."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self.group)
        return found

    def by_first(self, work: Callable[[], Result]) -> Result:
        """Do work on rank 0, and tell all what came of it.

        Args:
            work: What to do; what it returns can be pickled.

        Returns:
            What it returned.

        Raises:
            Exception: It failed; see `attempted`.
        """
        own = self.attempted(work if self.rank == 0 else lambda: None)
        return self.told(own)[0]  # type: ignore[no-any-return]

    def attempted(self, work: Callable[[], Result]) -> Result:
        """Do work on every rank; where it fails on one, it fails on all.

        Args:
            work: What to do, without the other ranks.

        Returns:
            What it returned on this one.

        Raises:
            Exception: It failed on this rank; or an error of the same kind, one of `KINDS`, that
                tells on which other.
        """
        failure = None
        try:
            result = work()
        except Exception as reason:
            failure = reason
        place = next((i for i, kind in enumerate(KINDS) if isinstance(failure, kind)), -1)
        told = self.told(failure and (place, f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        for rank, problem in enumerate(told):
            if problem:
                raise KINDS[problem[0]](f"rank {rank} of {self.size}: {problem[1]}")
        return result

    def check_alike(self, facts: Mapping[str, Any], where: str) -> None:
        """Check that all processes are about to do the same.

        Args:
            facts: What is to agree, by what it is called.
            where: Where in the training this is, for the error.

        Raises:
            ValueError: It does not; the same on every rank.
        """
        for rank, other in enumerate(told := self.told(facts)):
            for name, here in told[0].items():
                if other[name] != here:
                    sides = f"{_short(other[name], here)}, rank 0 {_short(here, other[name])}"
                    raise ValueError(
                        f"ranks must train alike: {where} {name} of rank {rank} is {sides}; seen "
                        f"by rank {self.rank} of {self.size}"
                    )

    @contextmanager
    def waiting(self, where: str, fewer: bool = False) -> Iterator[None]:
        """Add the rank and the place to an error, and to one of a lost rank what it means.

        Args:
            where: Where in the training this is, such as "in step 7".
            fewer: Whether the other may have come to the end of its batches.

        Yields:
            Nothing.

        Raises:
            RuntimeError: Another process takes no part any more.
        """
        try:
            yield
        except Exception as reason:
            if _is_lost(reason):
                others = f"rank {1 - self.rank}" if self.size == 2 else "the other ranks"
                told = {"rank": self.rank, "size": self.size, "others": others, "where": where}
                told |= {"fewer": FEWER if fewer else "", "reason": reason}
                raise RuntimeError(LOST.format(**told)) from reason
            if hasattr(reason, "add_note"):  # from Python 3.11 on
                reason.add_note(f"on rank {self.rank} of {self.size}, {where}")
            raise

    def patience(self) -> timedelta | None:
        """Return how long one waits for another; None where that is not known."""
        backend = self.group and self.group._get_backend(self._device())
        return getattr(getattr(backend, "options", None), "_timeout", None)

    def _device(self) -> torch.device:
        """Return the device for tensors that ranks exchange: the CPU, if the group supports it."""
        if "cpu:" in dist.get_backend_config(self.group):
            return torch.device("cpu")
        return torch.accelerator.current_accelerator() or torch.device("cpu")


def ranks_of(process_group: object, mesh: object) -> Ranks | None:
    """Return the processes that are to train together.

    Args:
        process_group: A group, or None.
        mesh: A mesh of one axis in its place, or None; not looked at beside a group.

    Returns:
        The processes; None without a group or mesh.

    Raises:
        TypeError: They are no group and no mesh.
        ValueError: The mesh has several axes; this process is not in the group, or alone in it.
    """
    if process_group is None and mesh is not None:
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh must have one axis, got {mesh.ndim} of sizes {tuple(mesh.shape)}: give that "
                "over which batches are spread, as mesh['name']"
            )
        process_group = mesh.get_group()
    if process_group is None:
        return None
    ranks = Ranks(process_group)
    if ranks.size == 1 < dist.get_world_size():
        raise ValueError(ALONE.format(dist.get_rank(), dist.get_world_size()))
    return ranks


def _is_lost(reason: Exception) -> bool:
    """Return whether an error is one of communication."""
    return isinstance(reason, dist.DistError) or (
        isinstance(reason, RuntimeError)
        and any(word in str(reason) for word in ("gloo", "pair closure", "Wait timeout"))
    )


def _short(value: Any, other: Any) -> str:
    """Print a value; of a mapping, the items that differ from another's."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        value = {k: v for k, v in value.items() if k not in other or other[k] != v}
    return f"{value!r:.300}"
