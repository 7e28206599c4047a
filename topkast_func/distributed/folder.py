"""Checkpoints in a folder, each whole or not there: tensors by `torch.distributed.checkpoint`.

A checkpoint is a folder ``step-N``, written under another name, ``step-N.part``, and renamed by
rank 0 once every rank has its part on the disk; then ``latest``, a text, is made to name it. So
whoever is killed when, a name without ``.part`` stands for a checkpoint that is whole.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from topkast_func.distributed.checksums import check_same, checksum
from topkast_func.distributed.names import ABOUT, PART, begin, by_age, check_folder, end
from topkast_func.distributed.ranks import Ranks
from topkast_func.files.drafts import replacing
from topkast_func.types import Tensors

FORMAT, VERSION = "topkast_func checkpoint", 1
DAMAGED = "{} is damaged, so nothing was loaded"
LATEST, METADATA = "latest", ".metadata"


def write(
    ranks: Ranks,
    folder: Path,
    step: int,
    header: Mapping[str, Any],
    tensors: Tensors,
    keep: int | None = None,
) -> Path:
    """Write a checkpoint, once all ranks are found to hold the same; a collective call.

    Beside what `torch.distributed.checkpoint` writes it has ``about.json``: ``format``,
    ``version``, ``header``, the ``checksums`` of the tensors, see `checksum`, in their order,
    under ``metadata`` BLAKE2b of the file ``.metadata``, and under ``digest`` that of all this in
    JSON.

    Args:
        ranks: The processes.
        folder: Where checkpoints are kept; no other job may write there.
        step: Number of the step.
        header: JSON object.
        tensors: Tensors by name, on any device; on the meta device those that others write.
        keep: How many checkpoints stay, the newest; None for all.

    Returns:
        The checkpoint: ``folder/step-N``, or ``folder/step-N.1`` and so on where there is one.

    Raises:
        RuntimeError: Ranks hold different tensors, a rank is lost, or one could not write.
        FileNotFoundError: A rank does not see the folder.
    """
    where = f"in save_sharded at step {step}"
    with ranks.waiting(where):
        about = {"format": FORMAT, "version": VERSION, "header": header}
        sums = check_same(ranks, f"rank {ranks.rank} of {ranks.size}, {where}", tensors)
        about["checksums"] = dict(zip(tensors, sums, strict=True))
        return _written(ranks, folder, step, about, tensors, keep)


def _written(
    ranks: Ranks, folder: Path, step: int, about: dict[str, Any], tensors: Tensors, keep: int | None
) -> Path:
    name = ranks.by_first(lambda: begin(folder, step))
    part = folder / f"{name}{PART}"
    try:
        ranks.attempted(lambda: _check_seen(part, "made"))
        writer = FileSystemWriter(part)
        stay = f"{part} was not written, and the checkpoints before it stay"
        with _by_torch(RuntimeError, stay), _no_warning(ranks):
            here = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
            save(here, storage_writer=writer, process_group=ranks.group)
        ranks.by_first(lambda: _finish(part, folder / name, about, keep))
    finally:
        end(part)
    return folder / name


def read(ranks: Ranks, folder: Path) -> tuple[Path, dict[str, Any], Tensors]:
    """Read a checkpoint on every rank, and check every tensor; a collective call.

    Args:
        ranks: The processes.
        folder: A checkpoint, or a folder of them, of which the latest is read.

    Returns:
        The checkpoint, its header, and the tensors by name on the CPU.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, foreign, or of another version.
    """
    path = ranks.by_first(lambda: _latest(folder))
    about, reader, tensors = ranks.attempted(lambda: _opened(path))
    with _by_torch(ValueError, DAMAGED.format(path)), _no_warning(ranks):
        load(tensors, storage_reader=reader, process_group=ranks.group)
    ranks.attempted(lambda: _check_tensors(path, tensors, about["checksums"]))
    return path, about["header"], tensors


def _check_seen(path: Path, how: str) -> None:
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} was {how} by rank 0 and is not there on this rank: checkpoints of several "
            "processes need a folder that all of them see"
        )


def _finish(part: Path, whole: Path, about: dict[str, Any], keep: int | None) -> None:
    """Give a checkpoint its name, let `latest` name it, and remove what is too old."""
    about = {**about, "metadata": _digest((part / METADATA).read_bytes())}
    with replacing(part / ABOUT) as file:
        file.write(json.dumps({**about, "digest": _digest(_encoded(about))}).encode())
    part.rename(whole)
    with replacing(whole.parent / LATEST) as file:  # which puts the new names on the disk too
        file.write(whole.name.encode())
    for old in by_age(whole.parent)[:-keep] if keep else []:
        doomed = old.with_name(f"{old.name}{PART}")
        old.rename(doomed)
        shutil.rmtree(doomed)


def _latest(folder: Path) -> Path:
    check_folder(folder)
    if (folder / ABOUT).is_file():
        return folder
    with suppress(FileNotFoundError):
        try:
            named = folder / (folder / LATEST).read_text()
        except UnicodeDecodeError as reason:
            raise ValueError(
                f"{folder / LATEST} is damaged: remove it to have the newest checkpoint read, or "
                f"name the one that you want ({reason})"
            ) from None
        if (named / ABOUT).is_file():
            return named
    if found := by_age(folder):
        return found[-1]
    raise FileNotFoundError(f"there is no checkpoint in {folder}")


def _opened(path: Path) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Return the facts of ``about.json``, a reader, and empty tensors to read into."""
    _check_seen(path, "found")
    with _by_torch(ValueError, DAMAGED.format(path)):
        about = dict(json.loads((path / ABOUT).read_text()))
        if about.pop("digest", None) != _digest(_encoded(about)) or about.get("format") != FORMAT:
            raise ValueError(f"{ABOUT} is not as it was written")
        if not all(isinstance(about.get(key), dict) for key in ("header", "checksums")):
            raise ValueError(f"{ABOUT} has no header, or no checksums")
        if _digest((path / METADATA).read_bytes()) != about["metadata"]:  # before it is unpickled
            raise ValueError(f"{METADATA} is not as it was written")
        reader = FileSystemReader(path)
        kinds: Any = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(kinds[name].size, dtype=kinds[name].properties.dtype, device="cpu")
            for name in about["checksums"]
        }
    if (version := about.get("version")) != VERSION:
        raise ValueError(
            f"{path} has format version {short(version)}, this topkast_func reads {VERSION}"
        )
    return about, reader, tensors


def _check_tensors(path: Path, tensors: Tensors, checksums: Mapping[str, int]) -> None:
    wrong = [name for name, tensor in tensors.items() if checksum(tensor) != checksums[name]]
    if wrong:
        raise ValueError(f"{DAMAGED.format(path)}: {wrong} do not match their checksums")


@contextmanager
def _by_torch(kind: type[Exception], problem: str) -> Iterator[None]:
    """Raise errors of torch, some of them no `Exception`, as one kind that names the problem."""
    try:
        yield
    except (Exception, CheckpointException) as reason:
        raise kind(f"{problem}: {_told(reason):.500}") from reason


def _told(reason: BaseException) -> str:
    """Describe an error; one that torch collected from several ranks by what each rank reported."""
    if isinstance(reason, CheckpointException):
        failures = reason.failures.items()
        return "; ".join(f"rank {rank}: {_told(own)}" for rank, (own, _) in failures)
    return f"{type(reason).__name__}: {reason}"


@contextmanager
def _no_warning(ranks: Ranks) -> Iterator[None]:
    """Silence torch's warning about a single process, where no other thread needs its filters."""
    if ranks.group is not None:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        yield


def _encoded(about: Mapping[str, Any]) -> bytes:
    return json.dumps(about).encode()


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()
