"""Files that appear whole or not at all, however many write them and whoever is killed."""

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def path_of(name: str, value: object) -> Path:
    """Return a path.

    Args:
        name: What it is called in the error.
        value: A text or a path.

    Returns:
        The path.

    Raises:
        TypeError: It is neither.
        ValueError: It holds a null character, which no file system takes.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a str or a pathlib.Path, got {type(value).__name__}")
    path = Path(value)
    if "\0" in str(path):
        raise ValueError(f"{name} must have no null character, got {value!r}")
    return path


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file that takes the place of ``path`` once it is whole and on the disk.

    What is written goes to a draft of its own in the same folder, on which its writer holds a
    lock (`flock`) until the draft has its final name. A draft without a lock is that of a writer
    that was killed: the next to write into the folder removes it.

    Args:
        path: The file. Where it is a symbolic link, what it points to is replaced.

    Yields:
        The draft, open for writing; the old file stays if an error leaves the context. Who may
        read and write the old file may so the new one.

    Raises:
        FileNotFoundError: The folder of the file is not there.
        IsADirectoryError: ``path`` is a folder.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder of {path} is not there: make it first")
    _sweep(target.parent)
    with _draft_in(target.parent) as (draft, file):
        yield file
        file.flush()
        with suppress(FileNotFoundError):
            draft.chmod(stat.S_IMODE(target.stat().st_mode))
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
    """Remove the drafts of writers that were killed: only those can be locked."""
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
