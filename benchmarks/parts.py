"""What a step of several ranks consists of, in seconds."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

from topkast_func.distributed import checksums
from topkast_func.distributed.parallel import DataParallel
from topkast_func.storage.compact import CompactWeights
from topkast_func.training import owned, refresh

PARTS: tuple[tuple[str, Any, str], ...] = (  # and the function, by where its name is looked up
    ("roll", DataParallel, "_roll"),  # in every step; where sets are chosen, with the comparing
    ("comparing", checksums, "check_same"),
    ("comparing", checksums.Rest, "checked"),
    ("choosing", refresh, "chosen_anew"),
    ("sending", owned, "_sets"),
    ("storing", CompactWeights, "chosen"),
)


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Add up the seconds in each part while it lasts; only those that are called have any."""
    spent: dict[str, float] = {}

    def timing(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **more: Any) -> Any:
            start = time.perf_counter()
            found = function(*arguments, **more)
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - start
            return found

        return call

    with ExitStack() as patched:
        for part, owner, name in PARTS:
            timer = timing(part, getattr(owner, name))
            patched.enter_context(patch.object(owner, name, timer))
        yield spent
