"""Text as codes, its parts and windows."""

from pathlib import Path

import pytest
import torch

from topkast_func.data import Characters, windows


@pytest.fixture
def text(tmp_path: Path) -> Characters:
    (tmp_path / "text").write_text("abracadabra é", encoding="utf-8")
    return Characters(tmp_path / "text")


def test_codes_spell_the_text(text: Characters) -> None:
    assert text.alphabet == " abcdré"
    assert "".join(text.alphabet[code] for code in text.codes) == "abracadabra é"


def test_parts_are_consecutive_and_whole(text: Characters) -> None:
    parts = text.split(0.5, 0.25)
    assert [len(part) for part in parts] == [6, 3, 4]
    assert torch.equal(torch.cat(parts), text.codes)


def test_windows_lie_within_the_text_and_reach_both_ends() -> None:
    drawn = windows(torch.arange(10), 4, 200, torch.Generator().manual_seed(0))
    assert drawn.shape == (200, 4)
    assert (drawn.diff() == 1).all()
    assert {int(drawn.min()), int(drawn.max())} == {0, 9}


def test_a_window_longer_than_the_text_is_refused() -> None:
    with pytest.raises(ValueError, match="a window of 5 characters is longer than a text of 4"):
        windows(torch.arange(4), 5, 1, torch.Generator())


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").touch()
    with pytest.raises(ValueError, match="is empty"):
        Characters(tmp_path / "text")


def test_a_missing_text_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt-get install bible-kjv && bible -f"):
        Characters(tmp_path / "none")
