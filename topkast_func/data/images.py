"""Images in the IDX files of MNIST and Fashion-MNIST."""

import gzip
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package ``dataset-fashion-mnist`` puts its files."""

HOW = "get Fashion-MNIST by 'apt-get install dataset-fashion-mnist', or pass the folder it is in"
FILES = {"train": "train", "test": "t10k"}


class Images(NamedTuple):
    """Images and their classes.

    Attributes:
        pixels: float32 in [0, 1], [n, 28, 28].
        labels: int64, [n], classes from 0 to 9.
    """

    pixels: Tensor
    labels: Tensor


def fashion_mnist(part: str, folder: str | os.PathLike[str] = FASHION_MNIST) -> Images:
    """Read Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), or MNIST in the same files.

    Args:
        part: "train" (60,000 images) or "test" (10,000).
        folder: Where the four IDX files are, compressed by gzip or not.

    Returns:
        The images.

    Raises:
        FileNotFoundError: A file is not there; the text says how to get it.
        ValueError: There is no such part, a file is no whole IDX file of bytes, or there are more
            or fewer labels than images.
    """
    if part not in FILES:
        raise ValueError(f"part must be one of {tuple(FILES)}, got {part!r}")
    pixels, labels = (
        _read(Path(folder), f"{FILES[part]}-{what}-ubyte")
        for what in ("images-idx3", "labels-idx1")
    )
    if len(pixels) != len(labels):
        raise ValueError(f"{folder} has {len(pixels)} images and {len(labels)} labels")
    return Images(
        torch.from_numpy(pixels.astype(np.float32) / 255),
        torch.from_numpy(labels.astype(np.int64)),
    )


def _read(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    """Read an IDX file: two zeros, the type, how many axes, their sizes (big endian), bytes."""
    plain, packed = folder / name, folder / f"{name}.gz"
    broken = f"{name} in {folder} is no whole IDX file of unsigned bytes"
    try:
        if plain.is_file():
            content = plain.read_bytes()
        elif packed.is_file():
            content = gzip.decompress(packed.read_bytes())
        else:
            raise FileNotFoundError(f"neither {plain} nor {packed} is there: {HOW}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as reason:
        raise ValueError(f"{broken}: {reason}") from reason
    axes = content[3] if content[:3] == UNSIGNED_BYTES and len(content) > 3 else 0
    start = 4 + 4 * axes
    if not axes or len(content) < start:
        raise ValueError(broken)
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    if len(content) != start + shape.prod():
        raise ValueError(broken)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


UNSIGNED_BYTES = b"\x00\x00\x08"
