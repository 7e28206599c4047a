"""Warnings that point at the line that called the library."""

import sys
import warnings
from pathlib import Path
from types import FrameType

import torch

_INNER = tuple(f"{Path(module).parent}/" for module in (__file__, torch.__file__))
"""Where the files of this library and of torch are."""


def is_inner(frame: FrameType) -> bool:
    """Return whether a frame runs code of this library or of torch."""
    return frame.f_code.co_filename.startswith(_INNER)


def warn_caller(message: str) -> None:
    """Warn whoever called the library, however deep within it the reason was found.

    Args:
        message: The warning.
    """
    level = 1
    while is_inner(sys._getframe(level)):
        level += 1
    warnings.warn(message, stacklevel=level + 1)
