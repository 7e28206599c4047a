"""Checkpoints of many processes: round trips, other numbers of ranks, kills, damage."""

import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.testing import assert_close

import topkast_func as tk
from tests.distributed.processes import FORKING, results, together
from tests.storage import STORAGES
from topkast_func.distributed import folder
from topkast_func.types import changed

CONFIG, ADAM = tk.TopKastConfig(0.75, 0.5, refresh_every=3), tk.adamw(lr=0.05)


def _network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.25), nn.Linear(8, 2))


def _loss(apply: Callable[..., Tensor], batch: Tensor) -> Tensor:
    return (apply(batch) - 1.0).square().mean()


def _start(storage: Any = "compact") -> tk.TrainState:
    return tk.init_state(_network(), CONFIG, ADAM, storage=storage)


def _train(state: tk.TrainState, until: int) -> tk.TrainState:
    group = dist.group.WORLD if dist.is_initialized() else None
    step = tk.make_train_step(_network(), _loss, CONFIG, ADAM, compile=False, process_group=group)
    rank = 0 if group is None else dist.get_rank()
    for number in range(int(state.step), until):
        chance = torch.Generator().manual_seed(10 * number + rank)
        state, _ = step(state, torch.randn(4, 6, generator=chance))
    return state


def _load(folder: Any, **options: Any) -> tk.TrainState:
    return tk.load_sharded(folder, CONFIG, _network(), ADAM, **options)


def same(one: tk.TrainState, other: tk.TrainState) -> None:
    """Compare states bit for bit, but for what θ at rest holds on B, which no one reads."""
    assert_close(_read(one), _read(other), rtol=0.0, atol=0.0)


def _read(state: tk.TrainState) -> tuple[Any, ...]:
    theta, sets = tk.dense_params(state), tk.masks_of(state)
    return theta, sets, state.weights.values, state[:3], state[4:]


def _error(work: Callable[[], Any]) -> str:
    try:
        work()
    except (RuntimeError, ValueError, TypeError, OSError) as reason:
        return f"{type(reason).__name__}: {reason}"
    return "none"


# --- by two ranks ----------------------------------------------------------------------------


def _save_and_go_on(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for storage in STORAGES:
        middle = _train(_start(storage), 5)
        tk.save_sharded(middle, folder / storage, CONFIG)
        end, loaded = _train(middle, 10), _load(folder / storage)
        same(loaded, middle)
        same(_train(loaded, 10), end)
        found[storage] = middle
    return found | _refused(rank, folder) | {"beside": _beside(rank, folder / "beside")}


def _held_up(rank: int, hold: Callable[[], object]) -> Callable[[], None]:
    """Let rank 1 do something before it writes, until the function that is returned is called."""
    own = FileSystemWriter.write_data

    def write_data(*arguments: Any) -> Any:
        hold()
        return own(*arguments)

    if rank == 1:
        setattr(FileSystemWriter, "write_data", write_data)  # noqa: B010
    return lambda: setattr(FileSystemWriter, "write_data", own)


def _fails() -> NoReturn:
    raise OSError("no space left")


def _beside(rank: int, folder: Path) -> dict[str, Any]:
    """Save while training goes on and rank 1 is late; then twice in a row; then in vain."""
    found: dict[str, Any] = {}
    first, latest = _train(_start(), 2), folder / "latest"
    may = Event()
    release = _held_up(rank, lambda: may.wait(30))
    future = tk.async_save_sharded(first, folder, CONFIG)
    found["state"] = pickle.loads(pickle.dumps(first))
    first.weights.values["0.bias"].zero_()  # a caller's own doing, the same on both
    second = _train(_train(_start(), 2), 6)
    found["early"] = (future.done(), latest.exists(), (folder / "step-2").exists())
    release()
    may.set()
    found["path"], found["latest"] = future.result(60).name, latest.read_text()
    found["loaded"] = _load(folder)
    futures = [tk.async_save_sharded(second, folder, CONFIG, keep=1) for _ in range(2)]
    tk.save_sharded(second, folder, keep=2)
    found["names"] = [future.result(60).name for future in futures]
    dist.barrier()
    found["folder"] = sorted(path.name for path in folder.iterdir())
    release = _held_up(rank, _fails)
    found["error"] = _error(lambda: tk.async_save_sharded(second, folder, CONFIG).result(60))
    release()
    found["after"] = latest.read_text()
    return found


def _load_by_name(rank: int, kept: Path) -> None:
    """Load a checkpoint by its name alone, from another folder on rank 1."""
    os.chdir(Path("/") if rank else kept.parent)
    tk.load_sharded(kept.name)


def _refused(rank: int, folder: Path) -> dict[str, str]:
    state, kept = _start(), folder / "compact"
    other = state._replace(seed=state.seed + rank)
    works: dict[str, Callable[[], Any]] = {
        "states": lambda: tk.save_sharded(other, folder / "new"),
        "folders": lambda: tk.save_sharded(state, folder / f"of {rank}"),
        "unseen": lambda: _load_by_name(rank, kept),
        "none": lambda: tk.load_sharded(folder / "nothing"),
        "config": lambda: tk.load_sharded(kept, replace(CONFIG, penalty_weight=0.3)),
        "one config": lambda: tk.load_sharded(
            kept, replace(CONFIG, penalty_weight=0.3) if rank else CONFIG
        ),
        "optimiser": lambda: tk.load_sharded(kept, optimizer=tk.sgd(lr=0.1)),
    }
    return {name: _error(work) for name, work in works.items()}


def _load_in_threes(rank: int, folder: Path) -> list[tk.TrainState]:
    return [_load(folder / storage) for storage in STORAGES]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("kept")
    return folder, results(_save_and_go_on, folder)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_checkpoint_of_two_ranks_is_one_of_one(storage: str, kept: Any) -> None:
    folder, pair = kept
    state = _load(folder / storage)
    for found in pair:
        same(state, found[storage])
    assert int(state.step) == 5
    assert state.optimizer.slots["adamw.exp_avg"]["0.weight"].count_nonzero() > 0
    parts = {path.name for path in (folder / storage / "step-5").glob("*.distcp")}
    assert parts == {"__0_0.distcp", "__1_0.distcp"}


def test_a_checkpoint_of_two_ranks_is_one_of_three(kept: Any) -> None:
    folder, (first, _) = kept
    for found in results(_load_in_threes, folder, ranks=3):
        for state, storage in zip(found, STORAGES, strict=True):
            same(state, first[storage])


def test_a_checkpoint_beside_training_appears_when_all_ranks_have_written(kept: Any) -> None:
    _, pair = kept
    for found in (both["beside"] for both in pair):
        assert found["early"] == (False, False, False)
        assert found["path"] == found["latest"] == "step-2"
        same(found["loaded"], found["state"])


def test_checkpoints_beside_training_stand_in_line_and_old_ones_go(kept: Any) -> None:
    _, pair = kept
    for found in (both["beside"] for both in pair):
        assert found["names"] == ["step-6", "step-6.1"]
        assert found["folder"] == ["latest", "step-6", "step-6.1"]
        assert "RuntimeError: " in found["error"]
        assert "step-6.2.part was not written, and the checkpoints before it stay" in found["error"]
        assert "checkpoints before it stay: rank 1: OSError: no space left" in found["error"]
        assert found["after"] == "step-6"


REFUSED = {
    "states": r"RuntimeError: rank \d of 2, in save_sharded at step 0: rank 1 holds another state",
    "folders": r"FileNotFoundError: .*step-0.part was made by rank 0 and is not there",
    "unseen": r"FileNotFoundError: .*step-5 was found by rank 0 and is not there",
    "none": r"FileNotFoundError: .*there is no checkpoint in .*nothing",
    "config": r"ValueError: .* with another configuration .*: penalty_weight is 1e-05 and not 0.3",
    "one config": r"ValueError: .* with another configuration",
    "optimiser": r"ValueError: .*step-5 holds a state of another optimiser: slots are",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_rank_cannot_save_or_load_no_rank_does(name: str, kept: Any) -> None:
    folder, pair = kept
    for found in pair:
        with pytest.raises(AssertionError, match=f"(?s){REFUSED[name]}"):
            raise AssertionError(found[name])
    assert not (folder / "new").exists()


def _dies_in_the_middle(rank: int, folder: Path) -> None:
    tk.save_sharded(_train(_start(), 1), folder)
    if rank == 1:
        setattr(FileSystemWriter, "write_data", _die)  # noqa: B010
    tk.save_sharded(_train(_start(), 2), folder)


def _die(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _save_once_more(rank: int, folder: Path) -> tk.TrainState:
    state = _train(_load(folder), 3)
    tk.save_sharded(state, folder)
    return state


def test_a_rank_that_is_killed_while_it_writes_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    first, second = together(_dies_in_the_middle, tmp_path)
    assert second.error == "died"
    assert first.error
    assert "rank 0 of 2 waited in vain for rank 1 in save_sharded at step 2" in first.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1", "step-2.part"]
    assert int(_load(tmp_path).step) == 1
    state, _ = results(_save_once_more, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1", "step-3"]
    same(_load(tmp_path), state)


def _hangs_in_the_middle(rank: int, folder: Path) -> None:
    if rank == 1:
        setattr(FileSystemWriter, "write_data", lambda *_: time.sleep(8))  # noqa: B010
    with pytest.raises(Exception, match="in save_sharded at step 1"):
        tk.save_sharded(_train(_start(), 1), folder)


def test_a_rank_that_hangs_while_it_writes_is_waited_for_as_long_as_in_a_step(
    tmp_path: Path,
) -> None:
    for outcome in together(_hangs_in_the_middle, tmp_path, patience=3.0):
        assert outcome.error is None, outcome.error


# --- by one process --------------------------------------------------------------------------


def test_the_newest_checkpoints_stay_and_none_is_written_over(tmp_path: Path) -> None:
    state = _start()
    whole = [tk.save_sharded(state, tmp_path, keep=3).name for _ in range(2)]
    whole += [tk.save_sharded(_train(state, n), tmp_path, keep=3).name for n in (3, 1)]
    assert whole == ["step-0", "step-0.1", "step-3", "step-1"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"latest", "step-0.1", "step-3", "step-1"}
    assert int(_load(tmp_path).step) == 1
    assert int(_load(tmp_path / "step-3").step) == 3
    (tmp_path / "latest").write_bytes(b"\xffstep-1")
    with pytest.raises(ValueError, match="latest is damaged: remove it"):
        _load(tmp_path)
    (tmp_path / "latest").unlink()
    assert int(_load(tmp_path).step) == 1
    shutil.rmtree(tmp_path / "step-1")
    assert int(_load(tmp_path).step) == 3
    for keep, error in ((0, ValueError), (True, TypeError)):
        with pytest.raises(error, match="keep must be"):
            tk.save_sharded(state, tmp_path, keep=keep)


def test_nothing_is_removed_but_checkpoints_and_their_drafts(tmp_path: Path) -> None:
    other = ("movie.part", "step-.part", "step-1a.part", "my-step-1.part", "step-best")
    for name in other:
        (tmp_path / name).mkdir()
        (tmp_path / name / "about.json").touch()
    for name in ("film.part", "step-0.part"):
        (tmp_path / name).touch()
    (tmp_path / "step-7.part").symlink_to(tmp_path / "movie.part")
    for name in ("step-3.part", "step-12.4.part"):
        (tmp_path / name).mkdir()
    state = _start()
    whole = [tk.save_sharded(state, tmp_path, CONFIG, keep=1).name for _ in range(2)]
    assert whole == ["step-0.1", "step-0.2"]
    there = {path.name for path in tmp_path.iterdir()}
    kept = {*other, "film.part", "step-0.part", "step-7.part"}
    assert there == kept | {"latest", "step-0.2"}
    assert all((tmp_path / name / "about.json").exists() for name in other)


def test_threads_that_save_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, inside, most = FileSystemWriter.write_data, [0], [0]

    def write_data(*arguments: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        inside[0] -= 1
        return own(*arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_data)
    state = _start()
    works = (tk.save_sharded, tk.async_save_sharded, tk.save_sharded)
    with ThreadPoolExecutor(3) as threads:
        for work in [threads.submit(work, state, tmp_path, CONFIG) for work in works]:
            assert work.exception() is None
    assert most == [1]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("latest", "step-0", "step-0.1", "step-0.2")
    }
    for where in (tmp_path, *tmp_path.glob("step-*")):
        same(tk.load_sharded(where), state)


def test_a_save_within_another_leaves_its_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, own, within = _start(), FileSystemWriter.write_data, []

    def write_data(*arguments: Any) -> Any:
        monkeypatch.setattr(FileSystemWriter, "write_data", own)
        signal.raise_signal(signal.SIGUSR1)
        return own(*arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_data)
    monkeypatch.chdir(tmp_path)
    before = signal.signal(
        signal.SIGUSR1, lambda *_: within.append(tk.save_sharded(state, tmp_path, CONFIG))
    )
    try:
        whole = tk.save_sharded(state, ".", CONFIG)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (whole.name, within) == ("step-0", [tmp_path / "step-0.1"])
    for where in (whole, *within):
        same(tk.load_sharded(where), state)


def test_a_process_alone_has_written_when_it_goes_on(tmp_path: Path) -> None:
    state = _start()
    future = tk.async_save_sharded(state, tmp_path, CONFIG)
    assert future.done()
    assert future.result() == tmp_path / "step-0"
    same(_load(tmp_path), state)
    (tmp_path / "file").touch()
    assert isinstance(tk.async_save_sharded(state, tmp_path / "file").exception(), OSError)
    with pytest.raises(ValueError, match="keep must be"):
        tk.async_save_sharded(state, tmp_path, keep=0)


def _save_until_killed(folder: Path, end: Any) -> None:
    state = _start()
    while True:
        state = state._replace(step=state.step + 1)
        marked = {n: v + float(state.step) for n, v in state.weights.values.items()}
        weights: Any = state.weights
        tk.save_sharded(state._replace(weights=changed(weights, values=marked)), folder, keep=2)
        end.send(int(state.step))


def killed_while_saving(folder: Path, seconds: float) -> tuple[int, int]:
    """Return the last step that was saved before a kill, and the one that loads."""
    own, end = FORKING.Pipe(duplex=False)
    process = FORKING.Process(target=_save_until_killed, args=(folder, end))
    process.start()
    end.close()
    saved = own.recv()
    time.sleep(seconds)
    process.kill()
    process.join()
    try:
        while True:
            saved = own.recv()
    except EOFError:
        state = tk.load_sharded(folder, CONFIG)
    values, start = state.weights.values, _start().weights.values
    for name, value in values.items():
        assert_close(value - start[name], torch.full_like(value, float(state.step)))
    return saved, int(state.step)


@pytest.mark.parametrize("kill", range(6))
def test_after_a_kill_the_last_whole_checkpoint_loads(kill: int, tmp_path: Path) -> None:
    saved, loaded = killed_while_saving(tmp_path, 0.011 * kill)
    assert loaded in (saved, saved + 1)


def test_damage_is_found(tmp_path: Path) -> None:
    state = _start()
    where = tk.save_sharded(state, tmp_path, CONFIG)
    data = next(where.glob("*.distcp"))
    content, found = bytearray(data.read_bytes()), 0
    for place in range(0, len(content), len(content) // 40):
        content[place] ^= 16
        data.write_bytes(content)
        content[place] ^= 16
        said = _error(lambda: same(tk.load_sharded(tmp_path), state))
        assert said == "none" or "step-0 is damaged, so nothing was loaded" in said
        found += said != "none"
    assert found > 5
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="step-0 is damaged, so nothing was loaded"):
        tk.load_sharded(tmp_path)
    data.write_bytes(content)
    same(tk.load_sharded(tmp_path), state)


def test_what_is_told_of_a_checkpoint_is_believed_as_it_was_written_alone(tmp_path: Path) -> None:
    where = tk.save_sharded(_start(), tmp_path, CONFIG) / "about.json"
    about = json.loads(where.read_text())
    about["header"]["config"]["penalty_weight"] = 0.5
    where.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"damaged, .*about.json is not as it was written"):
        tk.load_sharded(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("header", ["config"], "damaged, .*has no header, or no checksums"),
        ("checksums", None, "damaged, .*has no header, or no checksums"),
        ("version", {"of": "another"}, r"has format version \{'of': 'another'\}, this topk"),
        ("version", 2, r"has format version 2, this topkast_func reads 1"),
    ],
)
def test_what_is_told_of_a_checkpoint_is_of_its_kind_whoever_wrote_it(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    where = tk.save_sharded(_start(), tmp_path, CONFIG) / "about.json"
    about = {**json.loads(where.read_text()), key: value}
    about.pop("digest")
    where.write_text(json.dumps({**about, "digest": folder._digest(folder._encoded(about))}))
    with pytest.raises(ValueError, match=message):
        tk.load_sharded(tmp_path)
    del about[key]
    where.write_text(json.dumps({**about, "digest": folder._digest(folder._encoded(about))}))
    with pytest.raises(ValueError, match="format version None" if key == "version" else message):
        tk.load_sharded(tmp_path)


def test_what_is_unpickled_is_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tk.save_sharded(_start(), tmp_path, CONFIG) / ".metadata"
    content, read = bytearray(where.read_bytes()), list[object]()
    monkeypatch.setattr(FileSystemReader, "read_metadata", read.append)
    for damaged in (content[:-1], content + b".", bytes([content[0] ^ 1]) + content[1:]):
        where.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"step-0 is damaged, .*\.metadata is not as it was"):
            tk.load_sharded(tmp_path)
    where.unlink()
    with pytest.raises(ValueError, match=r"step-0 is damaged, .*\.metadata"):
        tk.load_sharded(tmp_path)
    assert not read


def test_a_checkpoint_without_its_configuration_asks_for_it(tmp_path: Path) -> None:
    state = _start()
    tk.save_sharded(state, tmp_path)
    with pytest.raises(ValueError, match="was saved without its configuration"):
        tk.load_sharded(tmp_path)
    same(tk.load_sharded(tmp_path, CONFIG, theta_device="cpu"), state)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_tensor_that_no_file_holds_is_named(tmp_path: Path) -> None:
    model, config, optimizer = nn.Linear(8, 4), tk.TopKastConfig(0.5), tk.sgd(0.1)
    steps = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    model.register_buffer("steps", steps)
    state = tk.init_state(model, config, optimizer)
    with pytest.raises(
        TypeError, match=r"buffers/steps has dtype torch\.qint8, which no file holds"
    ):
        tk.save_sharded(state, tmp_path / "state", config)
