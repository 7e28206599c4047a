"""Text as a sequence of characters."""

import os
from pathlib import Path

import torch
from torch import Tensor


class Characters:
    """A text for character-level models.

    Args:
        path: A text file in UTF-8, such as the King James Bible: ``apt-get install bible-kjv``,
            then ``bible -f gen1:1-rev22:21 > kjv.txt``.

    Attributes:
        alphabet: The characters that occur, sorted.
        codes: int64, [length]: the text, each character by its place in the alphabet.

    Raises:
        FileNotFoundError: The file is not there; the text says how to get one.
        ValueError: It is empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"there is no text at {path}: any will do; a large one is to be had by 'apt-get "
                "install bible-kjv && bible -f gen1:1-rev22:21 > kjv.txt'"
            )
        text = Path(path).read_text(encoding="utf-8")
        if not text:
            raise ValueError(f"the text at {path} is empty")
        self.alphabet = "".join(sorted(set(text)))
        places = {character: place for place, character in enumerate(self.alphabet)}
        self.codes = torch.tensor([places[character] for character in text], device="cpu")

    def split(self, *shares: float) -> list[Tensor]:
        """Cut the text into consecutive parts.

        Args:
            *shares: Share of each part but the last, fractions that add up to less than 1.

        Returns:
            The codes of each part; the last takes what is left.
        """
        sizes = [int(share * len(self.codes)) for share in shares]
        return list(torch.split(self.codes, [*sizes, len(self.codes) - sum(sizes)]))


def windows(codes: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw windows of a text at random.

    Args:
        codes: int64, [at least ``length``].
        length: Characters of a window.
        count: How many.
        generator: Of random numbers, on the CPU.

    Returns:
        int64, [count, length].

    Raises:
        ValueError: The text is shorter than a window.
    """
    if len(codes) < length:
        raise ValueError(f"a window of {length} characters is longer than a text of {len(codes)}")
    last = len(codes) - length + 1
    starts = torch.randint(last, (count,), generator=generator, device="cpu")
    return codes[starts[:, None] + torch.arange(length, device="cpu")]
