"""Dense training, the arm that the others are compared with."""

from dataclasses import dataclass
from typing import ClassVar

from topkast_func.methods.base import Method


@dataclass(frozen=True)
class Dense(Method):
    """See `dense`."""

    sparsifies: ClassVar[bool] = False


def dense() -> Method:
    """Train every weight densely: no parameter is sparse, whatever the configuration selects.

    Returns:
        The method.
    """
    return Dense()
