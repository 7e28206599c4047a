"""Files that appear whole or not at all, however many write them and whoever is killed."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file that takes the place of ``path`` once it is whole and on the disk.

    What is written goes to a draft of its own in the same folder, on which its writer holds a
    lock (`flock`) until the draft has its final name. A draft without a lock is that of a writer
    that was killed: the next to write into the folder removes it.

    Args:
        path: The file. Where it is a symbolic link, what it points to is replaced.

    Yields:
        The draft, open for writing; the old file stays if an error leaves the context.
    """
    target = Path(os.path.realpath(path))
    _sweep(target.parent)
    with _draft_in(target.parent) as (draft, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        draft.replace(target)
    _sync(target.parent)


@contextmanager
def _draft_in(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Create a draft and hold its lock; its name is free again after."""
    while True:
        draft = folder / _name(f"{os.getpid()}-{secrets.token_hex(8)}")
        with draft.open("xb") as file:
            with suppress(OSError):  # a file system without locks: nothing is swept there
                fcntl.flock(file, fcntl.LOCK_EX)
            if not draft.exists():  # swept before it was locked
                continue
            try:
                yield draft, file
            finally:
                draft.unlink(missing_ok=True)
            return


def _name(part: str) -> str:
    return f".topkast_func-{part}.draft"


def _sweep(folder: Path) -> None:
    """Remove the drafts of the dead: only those can be locked."""
    for draft in folder.glob(_name("*")):
        with suppress(OSError), draft.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.unlink()


def _sync(folder: Path) -> None:
    """Put the new name of a file on the disk, where the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
