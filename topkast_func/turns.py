"""Turns: what threads share, a module or the random numbers, has one user at a time.

`torch.func.functional_call` puts its tensors into the module itself, layers lend their forward
pass, and torch draws from one generator for the process, which torch.compile puts back after
it has traced. So whoever uses such a thing claims it, and waits in line for it. A thread that
in its turn turns out to need more never waits, as others may be waiting for what it has: it
gives all of it up and comes again.
"""

import os
import threading
from collections.abc import Callable
from typing import TypeAlias, TypeVar

Result = TypeVar("Result")

Claims: TypeAlias = frozenset[int | str]
"""Things with one user at a time: modules by their id, and the names below."""

RANDOM_NUMBERS: Claims = frozenset({"random numbers"})
"""The generators that torch draws from by itself."""

NO_RANDOM_NUMBERS: Claims = frozenset({"no random numbers"})
"""Nobody else draws: for work that is thought not to, and checks. Many may claim it at once."""

EVERYTHING: Claims = frozenset({"everything"})
"""For work that changes flags of the process, as compiling does: nobody else has a turn."""

_USED: dict[int, Claims] = {}
"""Claims of the threads that have a turn."""

_WAITING: dict[int, Claims] = {}
"""Claims of the threads that wait, in the order in which they came."""

_CHANGE = threading.Condition()
"""Guards both; notified when one of them changes."""


class _MoreNeededError(BaseException):
    """Ends a turn that needs more than it claimed; no ``except Exception`` on its way stops it."""

    def __init__(self, claims: Claims) -> None:
        super().__init__(claims)
        self.claims = claims


def in_turn(claims: Claims, run: Callable[[], Result]) -> Result:
    """Run a pure function while no other thread uses what it claims.

    A turn within a turn, such as that of a step in the loss function of another step, adds its
    claims to those of the outer one. Where another thread has what it claims, the outermost
    function starts again with the claims of both.

    Args:
        claims: What the function uses.
        run: The function.

    Returns:
        What the function returns.
    """
    me = threading.get_ident()
    if me in _USED:
        return _within(me, claims, run)
    while True:
        try:
            with _CHANGE:
                _WAITING[me] = claims
                _CHANGE.wait_for(lambda: _is_next(me))
                _USED[me] = _WAITING.pop(me)
            return run()
        except _MoreNeededError as needed:
            claims |= needed.claims
        finally:
            with _CHANGE:
                _WAITING.pop(me, None)
                _USED.pop(me, None)
                _CHANGE.notify_all()


def require(claims: Claims) -> None:
    """Continue if this turn holds some claims, or stronger ones; else begin it again with them.

    Args:
        claims: What turns out to be used.

    Raises:
        _MoreNeededError: It has not; `in_turn` begins again.
    """
    held = _USED[threading.get_ident()]
    drawing = claims == NO_RANDOM_NUMBERS and held & RANDOM_NUMBERS
    if not (claims <= held or held & EVERYTHING or drawing):
        raise _MoreNeededError(claims)


def _within(me: int, claims: Claims, run: Callable[[], Result]) -> Result:
    held = _USED[me]
    with _CHANGE:
        if any(_clash(claims, used) for thread, used in _USED.items() if thread != me):
            raise _MoreNeededError(claims)
        _USED[me] = held | claims
    try:
        return run()
    finally:
        with _CHANGE:
            _USED[me] = held
            _CHANGE.notify_all()


def _is_next(me: int) -> bool:
    """Return whether nobody claims what a waiting thread does, in their turn or before it."""
    if any(_clash(_WAITING[me], used) for used in _USED.values()):
        return False
    for thread, claims in _WAITING.items():
        if thread == me:
            return True
        if _clash(_WAITING[me], claims):
            return False
    return True


def _clash(one: Claims, other: Claims) -> bool:
    if (one | other) & EVERYTHING or (one & other) - NO_RANDOM_NUMBERS:
        return True
    pairs = ((one, other), (other, one))
    return any(a & RANDOM_NUMBERS and b & NO_RANDOM_NUMBERS for a, b in pairs)


def _alone_after_fork() -> None:
    """Forget the threads that a fork leaves behind."""
    global _CHANGE
    _CHANGE = threading.Condition()
    _USED.clear()
    _WAITING.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_alone_after_fork)
