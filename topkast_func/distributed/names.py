"""Checkpoints in a folder by their names: ``step-N`` or ``step-N.K``, with ``.part`` as drafts."""

import re
import shutil
from itertools import count
from pathlib import Path

ABOUT, PART = "about.json", ".part"

_NAME = re.compile(r"step-[0-9]+(\.[0-9]+)?")
_UNDER_WAY: set[Path] = set()
"""Drafts that this process writes: in other threads, or where a signal has interrupted it."""


def check_folder(folder: Path) -> None:
    """Check that checkpoints can be in a folder, which need not be there yet.

    Args:
        folder: The folder.

    Raises:
        NotADirectoryError: A file is in its place, or in that of a folder above it.
    """
    if files := [place for place in (folder, *folder.parents) if place.is_file()]:
        raise NotADirectoryError(
            f"{folder} must be a folder of checkpoints, and {files[0]} is a file: load reads what "
            "save wrote, a file, and load_sharded what save_sharded wrote, a folder"
        )


def begin(folder: Path, step: int) -> str:
    """Make the draft of a checkpoint; drafts that no one writes any more are removed.

    Args:
        folder: Where checkpoints are kept; nothing else in it is touched.
        step: Number of the step.

    Returns:
        The name that the checkpoint is to have; it is free, and so was that of its draft.

    Raises:
        NotADirectoryError: See `check_folder`.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    for left in place.glob(f"step-*{PART}"):
        named = _NAME.fullmatch(left.name.removesuffix(PART))
        if named and left.is_dir() and not left.is_symlink() and left not in _UNDER_WAY:
            shutil.rmtree(left)
    names = (f"step-{step}{f'.{again}' if again else ''}" for again in count())
    free = (n for n in names if not any((place / f"{n}{of}").exists() for of in ("", PART)))
    name = next(free)
    draft = place / f"{name}{PART}"
    _UNDER_WAY.add(draft)  # first, so that it is never there and unknown
    draft.mkdir()
    return name


def end(draft: Path) -> None:
    """Give up a draft: the next call of `begin` removes what is left of it."""
    _UNDER_WAY.discard(draft.resolve())


def by_age(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder that are whole, the oldest first."""
    found = [path.parent for path in folder.glob(f"step-*/{ABOUT}")]
    whole = [path for path in found if _NAME.fullmatch(path.name)]
    return sorted(whole, key=lambda path: (path / ABOUT).stat().st_mtime_ns)
