"""What is computed otherwise for a while, in one thread: over the parts that processes have."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class Elsewhere(threading.local, Generic[Function]):
    """Of each thread: what takes the place of a function where other processes have parts too.

    Attributes:
        taken: It; None where this process has all.
    """

    def __init__(self) -> None:  # in each thread: Dynamo guards what the instance itself holds
        self.taken: Function | None = None

    @contextmanager
    def by(self, function: Function) -> Iterator[None]:
        """Let a function take the place, in this thread; within another, until that goes on.

        Args:
            function: The function.

        Yields:
            Nothing.
        """
        before, self.taken = self.taken, function
        try:
            yield
        finally:
            self.taken = before
