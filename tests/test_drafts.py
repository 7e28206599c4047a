"""Files that are replaced whole: by many writers, through links, and while writers are killed."""

import fcntl
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from topkast_func.files import drafts
from topkast_func.files.drafts import replacing

SIZE = 200_000


def _write(path: Path, letter: bytes) -> None:
    with replacing(path) as file:
        for _ in range(10):
            file.write(letter * (SIZE // 10))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def test_a_file_appears_and_is_replaced(path: Path) -> None:
    for letter in (b"a", b"b"):
        _write(path, letter)
        assert path.read_bytes() == letter * SIZE
    assert list(path.parent.iterdir()) == [path]


def test_it_has_the_permissions_of_any_new_file(path: Path) -> None:
    _write(path, b"a")
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


def test_it_keeps_the_permissions_of_the_file_it_replaces(path: Path) -> None:
    _write(path, b"a")
    path.chmod(0o600)
    _write(path, b"b")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder: name a file in it"):
        _write(tmp_path, b"a")


def test_an_error_leaves_the_old_file_and_no_draft(path: Path) -> None:
    _write(path, b"a")
    with pytest.raises(TypeError), replacing(path) as file:
        file.write("no bytes")  # type: ignore[call-overload]
    assert path.read_bytes() == b"a" * SIZE
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder of .*nowhere/x is not there"):
        _write(tmp_path / "nowhere" / "x", b"a")


@pytest.mark.parametrize("relative", [False, True])
def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path, relative: bool) -> None:
    folder, elsewhere = tmp_path / "links", tmp_path / "files"
    folder.mkdir()
    elsewhere.mkdir()
    target, link, second = elsewhere / "target", folder / "link", folder / "second"
    link.symlink_to(Path("..", "files", "target") if relative else target)
    second.symlink_to(link)
    for letter, way in ((b"a", link), (b"b", link), (b"c", second)):
        _write(way, letter)
        assert target.read_bytes() == letter * SIZE
        assert not target.is_symlink()
        assert link.is_symlink()
        assert second.is_symlink()
    assert list(elsewhere.iterdir()) == [target]


def test_threads_that_write_one_file_leave_it_whole(path: Path) -> None:
    letters = [bytes([65 + number]) for number in range(26)]
    with ThreadPoolExecutor(8) as pool:
        writes = [pool.submit(_write, path, letter) for letter in letters]
        while not all(write.done() for write in writes):
            content = path.read_bytes() if path.exists() else letters[0] * SIZE
            assert content in {letter * SIZE for letter in letters}
        for write in writes:
            write.result()
    assert list(path.parent.iterdir()) == [path]


def test_a_draft_is_swept_when_its_writer_is_gone(path: Path) -> None:
    dead = path.with_name(".topkast_func-1-0.draft")
    dead.touch()
    alive = path.with_name(".topkast_func-999999999-1.draft")  # of no process: a lock decides
    others = [path.with_name(name) for name in (".file.draft", "topkast_func-1-0.draft")]
    for other in others:
        other.touch()
    with alive.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _write(path, b"a")
        assert {*path.parent.iterdir()} == {path, alive, *others}
    _write(path, b"a")
    assert {*path.parent.iterdir()} == {path, *others}


def test_a_draft_that_is_swept_before_it_is_locked_is_made_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[Path] = []

    def late(file: object, operation: int, lock: object = fcntl.flock) -> None:
        if not swept:
            swept.extend(path.parent.iterdir())
            swept[0].unlink()
        lock(file, operation)  # type: ignore[operator]

    monkeypatch.setattr(fcntl, "flock", late)
    _write(path, b"a")
    assert len(swept) == 1
    assert list(path.parent.iterdir()) == [path]


def test_a_file_system_without_locks_will_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError("no locks available")

    dead = path.with_name(".topkast_func-1-0.draft")
    dead.touch()
    monkeypatch.setattr(fcntl, "flock", refuse)
    _write(path, b"a")
    assert {*path.parent.iterdir()} == {path, dead}


WRITERS = """
import os, random, runpy, signal, sys, time
from pathlib import Path

replacing = runpy.run_path(sys.argv[1])["replacing"]  # without importing torch
path, generator = Path(sys.argv[2]), random.Random(0)

def write(letter, wait=0):
    with replacing(path) as file:
        for _ in range(50):
            file.write(letter * 4_000)
            time.sleep(wait)

def started(letter, wait=0):
    child = os.fork()
    while not child:
        write(letter, wait)
    return child

for kill in range(20):
    children = [started(b"a"), started(b"b"), started(b"c", wait=1000)]
    while not any(path.parent.glob(f".topkast_func-{children[2]}-*")):
        time.sleep(0.001)
    time.sleep(generator.uniform(0, 0.03))
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    content = path.read_bytes() if path.exists() else b"a" * 200_000
    assert content == content[:1] * 200_000, (kill, len(content))
    print(len(list(path.parent.glob(".topkast_func-*.draft"))))
write(b"d")
assert path.read_bytes() == b"d" * 200_000
assert list(path.parent.iterdir()) == [path]
"""


def test_processes_killed_while_they_write_leave_a_whole_file_and_drafts_that_go(
    path: Path,
) -> None:
    """Three processes write one file, one of them slowly; all are killed, 20 times."""
    done = subprocess.run(
        [sys.executable, "-c", WRITERS, drafts.__file__, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    left = [int(line) for line in done.stdout.split()]
    assert len(left) == 20
    assert {*left} <= {1, 2, 3}


def test_the_file_and_its_folder_are_put_on_the_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[bool, bool]] = []

    def note(handle: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(handle).st_mode), path.exists()))

    monkeypatch.setattr(os, "fsync", note)
    _write(path, b"a")
    assert synced == [(False, False), (True, True)]
