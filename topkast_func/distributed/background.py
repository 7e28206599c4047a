"""Work of all ranks beside the training: in a thread of each, over a group of its own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import RLock
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from topkast_func.distributed.ranks import Ranks
from topkast_func.distributed.roll import with_own_group

Result = TypeVar("Result")


class Background:
    """What a process does beside its training, one piece of work after the other.

    Where the ranks hand in the same work in the same order, it may send: its group is its own, so
    that what it sends does not get among what a step does.

    Args:
        ranks: The processes; making it is a collective call.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = with_own_group(ranks)
        self._thread = ThreadPoolExecutor(1, "topkast_func")

    def begin(self, work: Callable[[Ranks], Result]) -> Future[Result]:
        """Begin work, or have it wait for that before it.

        Args:
            work: It is called with the processes, and may send to them.

        Returns:
            What is to come of it.
        """
        return self._thread.submit(work, self._ranks)


_KNOWN: WeakKeyDictionary[dist.ProcessGroup, Background] = WeakKeyDictionary()
"""The background of each group that trains."""

_TURN = RLock()
"""Held by one thread of a single process; a signal may interrupt it with more work."""


def in_background(ranks: Ranks, work: Callable[[Ranks], Result]) -> Future[Result]:
    """Begin work of all ranks beside their training; a collective call.

    Args:
        ranks: The processes.
        work: See `Background.begin`. One process alone does it at once, its threads
            one after the other.

    Returns:
        What is to come of it.
    """
    if ranks.group is None:
        return _at_once(work, ranks)
    if ranks.group not in _KNOWN:
        _KNOWN[ranks.group] = Background(ranks)
    return _KNOWN[ranks.group].begin(work)


def _at_once(work: Callable[[Ranks], Result], ranks: Ranks) -> Future[Result]:
    done: Future[Result] = Future()
    try:
        with _TURN:
            done.set_result(work(ranks))
    except Exception as reason:
        done.set_exception(reason)
    return done
