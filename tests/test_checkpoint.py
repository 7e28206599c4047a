"""States on disk: round trips, resumed runs, kills, and files of others."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import topkast_func as tk
from tests.storage import STORAGES, dense_slots
from topkast_func.files import container
from topkast_func.methods.magnitude import TopKast

Named = list[tuple[str, Tensor]]

CONFIG = tk.TopKastConfig(forward_sparsity=0.75, backward_sparsity=0.5, refresh_every=3)
OPTIMIZERS = {
    "sgd": tk.sgd(lr=0.5),
    "momentum": tk.sgd(lr=0.1, momentum=0.9, nesterov=True),
    "adam": tk.adam(lr=0.05),
    "adamw": tk.adamw(lr=lambda step: 0.05 * (1.0 + math.cos(step / 4))),
}
MOMENTUM = OPTIMIZERS["momentum"]


def _flat(state: tk.TrainState) -> Named:
    """Name every tensor of a state, in the order in which the state has them."""
    named: Named = [
        ("step", state.step),
        ("seed", state.seed),
        ("sets", state.mask_seed),
        ("t", state.optimizer.step),
    ]
    trees: dict[str, dict[str, Tensor]] = {
        "theta": tk.dense_params(state),
        "A": {name: masks.forward for name, masks in tk.masks_of(state).items()},
        "B": {name: masks.backward for name, masks in tk.masks_of(state).items()},
        "buffers": state.buffers,
        "frozen": state.frozen,
        **dense_slots(state),
    }
    for prefix, tree in trees.items():
        named += [(f"{prefix} {name}", tensor) for name, tensor in tree.items()]
    return named


def _differing(one: tk.TrainState, other: tk.TrainState) -> list[str]:
    """Name the tensors in which two states differ by a bit, a dtype, a shape or a name."""
    first, second = _flat(one), _flat(other)
    if [name for name, _ in first] != [name for name, _ in second]:
        return ["names"]
    pairs = zip(first, second, strict=True)
    return [n for (n, a), (_, b) in pairs if a.dtype != b.dtype or not torch.equal(a, b)]


def same_leaves(one: tk.TrainState, other: tk.TrainState) -> bool:
    """Whether two states hold the very same values and slots, in one storage."""
    leaves = [tree_flatten((s.weights.values, s.optimizer))[0] for s in (one, other)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*leaves, strict=True))


def _network(features: int = 13, width: int = 13) -> nn.Sequential:
    """A model with dropout, BatchNorm and a frozen layer."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(features, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, 1),
    )
    model[4].requires_grad_(False)
    return model


def _square(apply: Callable[..., Tensor], batch: Tensor) -> Tensor:
    return (apply(batch) - 1.0).square().mean()


def _batches(steps: int) -> Tensor:
    return torch.randn(steps, 3, 13, generator=torch.Generator().manual_seed(4))


def _trained(
    model: nn.Module,
    optimizer: tk.Optimizer,
    config: tk.TopKastConfig,
    steps: int,
    storage: Any = "compact",
) -> tk.TrainState:
    step = tk.make_train_step(model, _square, config, optimizer, compile=False)
    state = tk.init_state(model, config, optimizer, seed=5, storage=storage)
    for batch in _batches(steps):
        state, _ = step(state, batch)
    return state


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.safetensors"


# --- round trip --------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_every_tensor_of_a_trained_state_comes_back_bit_for_bit(
    optimizer: tk.Optimizer, storage: str, path: Path
) -> None:
    model = _network()
    state = _trained(model, optimizer, CONFIG, 4, storage)
    assert state.buffers["1.num_batches_tracked"].dtype == torch.int64
    assert state.frozen.keys() == {"4.weight", "4.bias"}
    for tree in state.optimizer.slots.values():
        assert all(slot.count_nonzero() > 0 for slot in tree.values())
    tk.save(state, path)
    loaded = tk.load(path, CONFIG, model, optimizer)
    assert _differing(loaded, state) == []
    assert type(loaded.weights) is type(state.weights)
    assert same_leaves(loaded, state)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_every_dtype_name_and_shape_comes_back_in_order(
    optimizer: tk.Optimizer, storage: Any, path: Path
) -> None:
    theta = {
        "z/last.weight": torch.randn(4, 6, dtype=torch.bfloat16),
        "slots/sgd.momentum/weight": torch.randn(3, 4, dtype=torch.float16),
        "a.b/c.weight": torch.randn(2, 3, 3, dtype=torch.float64),
        "/": torch.randn(5),
        "": torch.randn(1, 2),
        "θ ∈ ℝ.weight": torch.randn(6, 2).T,
        "scale": torch.tensor(0.5),
    }
    state = tk.init_state(theta, CONFIG, optimizer, storage=storage)
    values = state.weights.values
    gradients = {name: torch.ones_like(leaf) for name, leaf in values.items()}
    _, moved = optimizer.update(gradients, state.optimizer, values)
    state = state._replace(optimizer=moved)
    tk.save(state, path)
    loaded = tk.load(path, CONFIG, optimizer=optimizer)
    assert list(tk.dense_params(loaded)) == list(theta)
    assert list(tk.masks_of(loaded)) == [name for name in theta if name.endswith("weight")]
    assert _differing(loaded, state) == []


def test_special_values_keep_their_bits(path: Path) -> None:
    theta = {"weight": torch.tensor([[math.inf, -0.0, 1e-45], [-math.inf, 0.0, 3.0]])}
    state = tk.init_state(theta, CONFIG, MOMENTUM)
    tk.save(state, path)
    loaded = tk.dense_params(tk.load(path, CONFIG))["weight"]
    assert torch.equal(loaded.view(torch.int32), theta["weight"].view(torch.int32))


def test_a_state_that_holds_nan_is_not_saved_over_one_that_does_not(path: Path) -> None:
    model, bad = _network(), torch.full((3, 13), math.nan)
    step = tk.make_train_step(model, _square, CONFIG, MOMENTUM, compile=False)
    before = tk.init_state(model, CONFIG, MOMENTUM)
    tk.save(before, path)
    state, metrics = step(before, bad)
    assert metrics.loss.isnan()
    with pytest.raises(ValueError, match=r"theta/0\.weight holds NaN"):
        tk.save(state, path)
    assert _differing(tk.load(path, CONFIG), before) == []


def test_save_leaves_the_state_as_it_is_and_load_the_file(path: Path) -> None:
    state = _trained(_network(), MOMENTUM, CONFIG, 2)
    copy = torch.utils._pytree.tree_map(torch.clone, state)
    tk.save(state, path)
    content = path.read_bytes()
    assert _differing(state, copy) == []
    tk.load(path, CONFIG)
    assert path.read_bytes() == content


def test_the_same_state_gives_the_same_file(path: Path) -> None:
    state = _trained(_network(), MOMENTUM, CONFIG, 2)
    tk.save(state, path)
    content = path.read_bytes()
    tk.save(state, str(path))
    assert path.read_bytes() == content


def test_the_file_is_plain_safetensors_with_a_json_header(path: Path) -> None:
    state = _trained(_network(), MOMENTUM, CONFIG, 2)
    tk.save(state, path, CONFIG)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["topkast_func"])
        assert (header["format"], header["version"]) == ("topkast_func state", 4)
        assert (header["storage"], header["layers"]) == ("compact", ["0.weight", "6.weight"])
        assert header["values"] == {"0.weight": [85], "6.weight": [7]}
        assert header["slots"] == ["sgd.momentum"]
        assert header["config"] == json.loads(CONFIG.to_json())
        theta = file.get_tensor("theta/0.weight")
        assert torch.equal(theta, tk.dense_params(state)["0.weight"])
        slot = file.get_tensor("slots/sgd.momentum/0.weight")
        assert torch.equal(slot, state.optimizer.slots["sgd.momentum"]["0.weight"])
        masks = tk.masks_of(state)["0.weight"]
        backward = np.unpackbits(file.get_tensor("backward/0.weight").numpy(), bitorder="little")
        assert np.array_equal(backward[:169], masks.backward.numpy().ravel())
        forward = np.unpackbits(file.get_tensor("forward/0.weight").numpy(), bitorder="little")
        assert np.array_equal(forward[:85], masks.forward[masks.backward].numpy())


def test_a_loaded_state_does_not_change_with_the_file(path: Path) -> None:
    state = _trained(_network(), MOMENTUM, CONFIG, 2)
    tk.save(state, path)
    loaded = tk.load(path, CONFIG)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert _differing(loaded, state) == []


# --- resumed runs ------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("name", "pause"),
    [
        *(("momentum", pause) for pause in (1, 2, 3, 4, 8, 9, 10)),
        ("sgd", 4),
        ("adam", 4),
        ("adamw", 4),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    name: str, pause: int, storage: Any, path: Path
) -> None:
    """Refreshes come before steps 3 and 6, B becomes A before step 8; dropout is drawn."""
    optimizer = OPTIMIZERS[name]
    config = tk.TopKastConfig(0.75, 0.5, refresh_every=3, explore_until=8)
    model = _network()
    step = tk.make_train_step(model, _square, config, optimizer, compile=False)
    state = resumed = tk.init_state(model, config, optimizer, seed=5, storage=storage)
    chosen = []
    for t, batch in enumerate(_batches(12)):
        if t == pause:
            tk.save(resumed, path)
            fresh = _network()
            step_again = tk.make_train_step(fresh, _square, config, optimizer, compile=False)
            resumed = tk.load(path, config, fresh, optimizer)
        state, metrics = step(state, batch)
        resumed, metrics_again = (step if t < pause else step_again)(resumed, batch)
        assert all(map(torch.equal, metrics[:-1], metrics_again[:-1]))
        chosen.append(tk.masks_of(state)["0.weight"])
    assert _differing(resumed, state) == []
    assert not torch.equal(chosen[2].backward, chosen[3].backward)
    assert torch.equal(chosen[9].backward, chosen[9].forward)


def test_a_run_with_a_dense_weight_resumes_bit_for_bit(path: Path) -> None:
    """A dense weight enters the product as it lies in memory, where rounding may depend on it."""
    config = tk.TopKastConfig(0.75, 0.5, sparse="0.weight", refresh_every=3)
    for width in range(9, 17):
        model = nn.Sequential(nn.Linear(13, width), nn.ReLU(), nn.Linear(width, 1))
        step = tk.make_train_step(model, _square, config, MOMENTUM, compile=False)
        state = _trained(model, MOMENTUM, config, 2)
        tk.save(state, path)
        resumed = tk.load(path, config, model, MOMENTUM)
        for batch in _batches(4):
            state, _ = step(state, batch)
            resumed, _ = step(resumed, batch)
        assert _differing(resumed, state) == [], width


def test_a_compiled_run_resumes_bit_for_bit(path: Path) -> None:
    optimizer = OPTIMIZERS["adamw"]
    model = nn.Sequential(nn.Linear(13, 13), nn.Dropout(0.25), nn.Linear(13, 1))
    step = tk.make_train_step(model, _square, CONFIG, optimizer)
    state = tk.init_state(model, CONFIG, optimizer)
    batches = _batches(8)
    for batch in batches[:4]:
        state, _ = step(state, batch)
    tk.save(state, path)
    resumed = tk.load(path, CONFIG, model, optimizer)
    for batch in batches[4:]:
        state, _ = step(state, batch)
        resumed, _ = step(resumed, batch)
    assert _differing(resumed, state) == []


def test_theta_of_a_compact_state_rests_where_it_is_told(path: Path) -> None:
    state = _trained(_network(), MOMENTUM, CONFIG, 2)
    tk.save(state, path)
    assert _differing(tk.load(path, CONFIG, theta_device="cpu"), state) == []
    tk.save(_trained(_network(), MOMENTUM, CONFIG, 2, "dense"), path)
    with pytest.raises(ValueError, match="theta_device is for compact storage"):
        tk.load(path, CONFIG, theta_device="cpu")


# --- atomic ------------------------------------------------------------------------------

KILLED = """
import os, signal, sys, torch, topkast_func as tk

def cut_and_kill(file):
    os.ftruncate(file, 1000)
    os.kill(os.getpid(), signal.SIGKILL)

for number in range(9):
    if number == 5:
        os.fsync = cut_and_kill
    weights = {"weight": torch.full((30, 30), float(number))}
    tk.save(tk.init_state(weights, tk.TopKastConfig(), tk.sgd(lr=0.1)), sys.argv[1])
"""


def test_a_process_killed_while_saving_leaves_the_file_of_the_save_before(path: Path) -> None:
    """The sixth of several saves dies with SIGKILL when 1000 bytes are on the disk."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    theta = tk.dense_params(tk.load(path, tk.TopKastConfig()))["weight"]
    assert torch.equal(theta, torch.full((30, 30), 4.0))


@pytest.mark.parametrize(("owner", "failing"), [(os, "fsync"), (Path, "replace")])
def test_an_error_while_writing_leaves_the_old_file_and_no_draft(
    owner: object, failing: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> NoReturn:
        raise OSError("no space left")

    tk.save(_trained(_network(), MOMENTUM, CONFIG, 1), path)
    content = path.read_bytes()
    monkeypatch.setattr(owner, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        tk.save(_trained(_network(), MOMENTUM, CONFIG, 2), path)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_until_the_whole_file_is_written_the_old_one_is_in_place(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill would leave: seen from within the calls that sync the file, then its folder."""
    old, new = (_trained(_network(), MOMENTUM, CONFIG, steps) for steps in (1, 2))
    tk.save(old, path)
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(tk.load(path, CONFIG)))
    tk.save(new, path)
    assert [_differing(*pair) for pair in zip(seen, (old, new), strict=True)] == [[], []]
    assert list(path.parent.iterdir()) == [path]


def test_threads_save_to_one_path_through_a_link(path: Path) -> None:
    states = [_trained(_network(), MOMENTUM, CONFIG, steps) for steps in (1, 2, 3, 4)]
    link = path.with_name("latest")
    link.symlink_to(path)
    tk.save(states[0], link)
    with ThreadPoolExecutor(4) as pool:
        saves = [pool.submit(tk.save, state, link) for state in states * 3]
        while not all(save.done() for save in saves):
            loaded = tk.load(link, CONFIG)
            assert _differing(loaded, states[int(loaded.step) - 1]) == []
        for save in saves:
            save.result()
    assert link.is_symlink()
    assert {*path.parent.iterdir()} == {path, link}


# --- files that must be refused ----------------------------------------------------------


@pytest.fixture
def saved(path: Path) -> Path:
    tk.save(_trained(_network(), MOMENTUM, CONFIG, 4), path)
    return path


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no state at"):
        tk.load(tmp_path, CONFIG)


def test_a_missing_file_is_not_found(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no state at .*state\.safetensors"):
        tk.load(path, CONFIG)


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"state\.safetensors is .*cut off"):
        tk.load(saved, CONFIG)


def test_a_flipped_bit_of_any_tensor_is_refused_by_its_name(saved: Path) -> None:
    with container.opened(saved) as file:
        start, entries = file.data, file.entries
    content = saved.read_bytes()
    for name, entry in entries.items():
        changed = bytearray(content)
        changed[start + entry.start] ^= 64
        saved.write_bytes(changed)
        named = "step" if name == "checksums" else name
        with pytest.raises(ValueError, match=f"loaded: {re.escape(named)} does not match its ch"):
            tk.load(saved, CONFIG)


def _wider() -> nn.Module:
    return _network(width=14)


def _deeper() -> nn.Module:
    return nn.Sequential(*_network(), nn.Linear(1, 1))


def _wider_where_frozen() -> nn.Module:
    model = _network()
    model[4] = nn.Linear(13, 14).requires_grad_(False)
    return model


def _wider_buffers() -> nn.Module:
    model = _network()
    model[1].register_buffer("running_mean", torch.zeros(14))
    return model


def _frozen_elsewhere() -> nn.Module:
    model = _network()
    model[0].requires_grad_(False)
    return model


def _frozen_nowhere() -> nn.Module:
    return _network().requires_grad_()


def _more_buffers() -> nn.Module:
    model = _network()
    model[0].register_buffer("extra", torch.zeros(1))
    return model


def _more_frozen() -> nn.Module:
    model = _network()
    model[2].extra = nn.Parameter(torch.zeros(1), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_wider, r"'0\.weight' has shape \(13, 13\), the model \(14, 13\)"),
        (_deeper, r"missing \['7\.bias', '7\.weight'\]"),
        (lambda: nn.Sequential(nn.Linear(13, 13)), r"unknown \['1\.bias', .*'6\.weight'\]"),
        (_frozen_elsewhere, r"of the parameters .*unknown \['0\.bias', '0\.weight'\]"),
        (_frozen_nowhere, r"of the parameters missing \['4\.bias', '4\.weight'\]"),
        (_wider_where_frozen, r"4\.(weight|bias)"),
        (_wider_buffers, r"1\.running_mean"),
        (lambda: _network().double(), r"'0\.weight' has dtype torch.float32, the model torch.fl"),
        (_more_buffers, r"0\.extra"),
        (_more_frozen, r"2\.extra"),
    ],
)
def test_the_state_of_another_model_is_refused(
    saved: Path, make: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ValueError, match=f"holds a state of another .*{message}"):
        tk.load(saved, CONFIG, make())


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (OPTIMIZERS["sgd"], r"sgd\(.*\) are \[\]"),
        (OPTIMIZERS["adam"], r"adam\(.*\) are \['adam.exp_avg', 'adam.exp_avg_sq'\]"),
        (OPTIMIZERS["adamw"], r"adamw\(.*\) are \['adamw.exp_avg', 'adamw.exp_avg_sq'\]"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(
    saved: Path, optimizer: tk.Optimizer, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"slots are \['sgd.momentum'\], those of {message}"):
        tk.load(saved, CONFIG, optimizer=optimizer)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tk.TopKastConfig(0.8, 0.5), r"'0\.weight' has \(42, 85\) entries in A and B, .*\(34, 85"),
        (tk.TopKastConfig(0.75, 0.6), r"'0\.weight' has \(42, 85\) entries in A and B, .*\(42, 68"),
        (tk.TopKastConfig(0.75, 0.75, explore_until=9), r"'0\.weight' has \(42, 85\)"),
        (
            tk.TopKastConfig(0.75, 0.5, sparse="0.weight"),
            r"sparse parameters missing \[\], unknown \['6\.weight'\]",
        ),
        (
            tk.TopKastConfig(0.75, 0.5, sparse="*.weight"),
            r"sparse parameters missing \['1\.weight'\], unknown \[\]",
        ),
    ],
)
def test_the_state_of_another_configuration_is_refused(
    saved: Path, config: tk.TopKastConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=f"holds a state of another .*{message}"):
        tk.load(saved, config)


def test_a_pattern_that_matches_nothing_in_the_file_is_refused(saved: Path) -> None:
    config = tk.TopKastConfig({"encoder.*": 0.75}, 0.5)
    with pytest.raises(ValueError, match=r"'encoder\.\*' matches no selected parameter; .*: '0\.w"):
        tk.load(saved, config)


def test_a_state_whose_exploration_ended_needs_a_configuration_that_ends_it(path: Path) -> None:
    stopped = tk.TopKastConfig(0.75, 0.5, refresh_every=3, explore_until=2)
    tk.save(_trained(_network(), MOMENTUM, stopped, 4), path)
    loaded = tk.load(path, stopped)
    masks = tk.masks_of(loaded)["0.weight"]
    assert torch.equal(masks.backward, masks.forward)
    for other in (CONFIG, tk.TopKastConfig(0.75, 0.5, explore_until=5)):
        with pytest.raises(ValueError, match=r"has \(42, 42\) entries in A and B"):
            tk.load(path, other)


def test_a_state_that_explores_needs_a_configuration_that_has_not_ended_it(path: Path) -> None:
    tk.save(_trained(_network(), MOMENTUM, CONFIG, 4), path)
    tk.load(path, tk.TopKastConfig(0.75, 0.5, explore_until=4))
    with pytest.raises(ValueError, match=r"has \(42, 85\) entries in A .* asks for \(42, 42\)"):
        tk.load(path, tk.TopKastConfig(0.75, 0.5, explore_until=3))


def test_every_problem_of_a_file_is_named_at_once(saved: Path) -> None:
    config = tk.TopKastConfig(0.8, 0.5)
    with pytest.raises(ValueError, match=r"missing.*entries in A and B.*slots are"):
        tk.load(saved, config, _deeper(), OPTIMIZERS["adam"])


def test_blocks_are_counted_whole(path: Path) -> None:
    config = tk.TopKastConfig(0.75, 0.5, block_shape=(2, 2))
    state = tk.init_state({"weight": torch.randn(6, 6)}, config, MOMENTUM)
    tk.save(state, path)
    assert _differing(tk.load(path, config), state) == []
    with pytest.raises(ValueError, match=r"has blocks of \(2, 2\), .* asks for \(1, 1\)"):
        tk.load(path, CONFIG)
    fewer = tk.TopKastConfig(0.75, 0.75, block_shape=(2, 2))
    with pytest.raises(ValueError, match=r"has \(8, 20\) entries in A and B.* asks for \(8, 8\)"):
        tk.load(path, fewer)


@pytest.mark.parametrize("storage", STORAGES)
def test_sets_of_entries_are_no_sets_of_blocks(path: Path, storage: Any) -> None:
    torch.manual_seed(0)
    params = {"weight": torch.randn(8, 8)}
    config = tk.TopKastConfig(0.75, 0.5)
    tk.save(tk.init_state(params, config, MOMENTUM, storage=storage), path)
    with pytest.raises(ValueError, match=r"'weight'.* blocks of \([12], [12]\)"):
        tk.load(path, tk.TopKastConfig(0.75, 0.5, block_shape=(2, 2)))


def _explored() -> tk.TrainState:
    """A state in which B has become A, its places of B∖A unused."""
    stopped = tk.TopKastConfig(0.75, 0.5, refresh_every=3, explore_until=2)
    return _trained(_network(), MOMENTUM, stopped, 4)


def test_unused_places_come_back_and_with_them_the_choice_of_engines(path: Path) -> None:
    state = _explored()
    tk.save(state, path)
    loaded = tk.load(path, tk.TopKastConfig(0.75, 0.5, refresh_every=3, explore_until=2))
    assert same_leaves(loaded, state)
    shapes = {name: value.shape for name, value in state.weights.values.items()}
    assert {name: value.shape for name, value in loaded.weights.values.items()} == shapes
    assert tk.explain(loaded) == tk.explain(state)


# --- the configuration in the file --------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_a_file_alone_gives_back_state_and_configuration(storage: Any, path: Path) -> None:
    config = tk.TopKastConfig(
        {"0.*": 0.75, "6.*": 0.5},
        tk.staged({0: 0.5, 3: 0.25}),
        sparse=["0.weight", "6.weight"],
        refresh_every=3,
        method=tk.random_backward(),
    )
    model = _network()
    state = _trained(model, MOMENTUM, config, 4, storage)
    tk.save(state, path, config)
    assert tk.load_config(path) == config
    for arguments in ((), (config,), (None, model), (config, model, MOMENTUM)):
        assert _differing(tk.load(path, *arguments), state) == []
    assert _differing(tk.load(path, model=model, optimizer=MOMENTUM), state) == []


def test_a_file_without_a_configuration_needs_one(saved: Path) -> None:
    for read in (tk.load, tk.load_config):
        with pytest.raises(ValueError, match="was saved without its configuration: pass it as con"):
            read(saved)


def test_a_configuration_that_contradicts_the_files_is_refused_with_both_sides(path: Path) -> None:
    tk.save(_trained(_network(), MOMENTUM, CONFIG, 4), path, CONFIG)
    other = replace(CONFIG, refresh_every=5, method=tk.rigl(0.5), backward_sparsity=0.75)
    message = (
        r"another configuration than the one given: backward_sparsity is 0.5 and not 0.75; "
        r"refresh_every is 3 and not 5; method is {'name': 'topkast', .*} and not {'name': 'rigl', "
        r"'drop_fraction': 0.5}. Load it without"
    )
    with pytest.raises(ValueError, match=message):
        tk.load(path, other)
    with pytest.raises(ValueError, match=r"sparse is None and not {'code': '.*_asks_grad'}"):
        tk.load(path, replace(CONFIG, sparse=_asks_grad))


@pytest.mark.parametrize("given", [nn.Linear(1, 1), "0.9", {}])
def test_what_is_no_configuration_or_optimizer_is_refused(saved: Path, given: Any) -> None:
    with pytest.raises(TypeError, match="config must be a TopKastConfig, got"):
        tk.load(saved, given)
    with pytest.raises(TypeError, match="config must be a TopKastConfig, got"):
        tk.save(tk.load(saved, CONFIG), saved, given)
    with pytest.raises(TypeError, match="optimizer must be what sgd"):
        tk.load(saved, CONFIG, optimizer=given)


def test_a_state_is_not_saved_with_the_configuration_of_another(saved: Path) -> None:
    state, content = tk.load(saved, CONFIG), saved.read_bytes()
    with pytest.raises(ValueError, match=r"another configuration: '0\.weight' has \(42, 85\)"):
        tk.save(state, saved, tk.TopKastConfig(0.8, 0.5))
    assert saved.read_bytes() == content


def _asks_grad(name: str, tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor.ndim == 2


def _asks_type(name: str, tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.ndim == 2


@pytest.mark.parametrize("predicate", [_asks_grad, _asks_type])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_predicate_is_given_again_and_asked_about_the_model(
    predicate: Any, storage: Any, path: Path
) -> None:
    config, model = replace(CONFIG, sparse=predicate), _network()
    state = _trained(model, MOMENTUM, config, 4, storage)
    tk.save(state, path, config)
    assert _differing(tk.load(path, config, model, MOMENTUM), state) == []
    with pytest.raises(ValueError, match=rf"sparse is the code of .*{predicate.__name__}: pass"):
        tk.load(path, model=model)
    with pytest.raises(ValueError, match=r"selects no parameter.* pass the module as model"):
        tk.load(path, config)
    with pytest.raises(ValueError, match="refresh_every is 3 and not 4"):
        tk.load(path, replace(config, refresh_every=4), model)
    with pytest.raises(ValueError, match=r"sparse is {'code': .*} and not \['0.weight'\]"):
        tk.load(path, replace(CONFIG, sparse="0.weight"), model)


def test_a_predicate_that_asks_for_less_needs_no_model(path: Path) -> None:
    config = replace(CONFIG, sparse=lambda name, tensor: tensor.shape[-1] == 13 and tensor.ndim > 1)
    state = _trained(_network(), MOMENTUM, config, 4)
    tk.save(state, path, config)
    assert _differing(tk.load(path, config), state) == []
    other = replace(config, sparse=lambda name, tensor: name == "0.weight")
    with pytest.raises(ValueError, match=r"unknown \['6.weight'\] \(the predicate was asked about"):
        tk.load(path, other)


@dataclass(frozen=True)
class _Own(TopKast):
    """A method of one's own."""


def test_a_method_of_ones_own_is_given_again(path: Path) -> None:
    config = replace(CONFIG, method=_Own())
    state = _trained(_network(), MOMENTUM, config, 4)
    tk.save(state, path, config)
    assert _differing(tk.load(path, config), state) == []
    for read in (tk.load, tk.load_config):
        with pytest.raises(ValueError, match=r"hold code, and method is the code of .*\._Own"):
            read(path)
    with pytest.raises(ValueError, match=r"method is {'code': .*_Own'} and not {'name': 'topkast'"):
        tk.load(path, CONFIG)


# --- what files hold ----------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_takes_little_more_than_the_dense_parameters(
    dtype: torch.dtype, storage: Any, path: Path
) -> None:
    """At 95/90 with plain SGD, though A and B are in the file as well."""
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 250), nn.Conv1d(20, 30, 5)).to(dtype)
    config = tk.TopKastConfig(0.95, 0.9)
    tk.save(tk.init_state(model, config, OPTIMIZERS["sgd"], storage=storage), path, config)
    dense = sum(parameter.nbytes for parameter in model.parameters())
    assert dense < path.stat().st_size < 1.1 * dense


@pytest.mark.parametrize("storage", STORAGES)
def test_complex_buffers_and_frozen_parameters_come_back(storage: Any, path: Path) -> None:
    model = _network()
    wave = torch.randn(3, 2, dtype=torch.complex128)
    model.register_buffer("wave", wave.conj())
    model.spectrum = nn.Parameter(torch.tensor(1 - 2j, dtype=torch.complex64), requires_grad=False)
    state = tk.init_state(model, CONFIG, MOMENTUM, storage=storage)
    tk.save(state, path, CONFIG)
    loaded = tk.load(path, None, model, MOMENTUM)
    assert _differing(loaded, state) == []
    assert loaded.buffers["wave"].dtype == torch.complex128
    assert loaded.frozen["spectrum"].dtype == torch.complex64


def _factored() -> tk.Optimizer:
    """An optimiser of one's own, with slots 0-d, of one entry, one per row, and int64."""

    def init(params: Any) -> tk.OptimizerState:
        make: dict[str, Callable[[Tensor], Tensor]] = {
            "count": lambda p: torch.tensor(3),
            "a/b": lambda p: torch.ones(1),
            "a": lambda p: torch.full((p.shape[0],), 0.5),
            "like %2F": lambda p: torch.ones_like(p, dtype=torch.float64),
        }
        slots = {kind: {n: slot(p) for n, p in params.items()} for kind, slot in make.items()}
        return tk.OptimizerState(torch.tensor(0), slots)

    return replace(tk.sgd(0.1), init=init)


@pytest.mark.parametrize("storage", STORAGES)
def test_slots_of_any_shape_come_back(storage: Any, path: Path) -> None:
    params = {"b/weight": torch.randn(8, 6), "weight": torch.randn(8, 6), "bias": torch.randn(8)}
    optimizer = _factored()
    state = tk.init_state(params, CONFIG, optimizer, storage=storage)
    tk.save(state, path, CONFIG)
    loaded = tk.load(path, optimizer=optimizer)
    assert same_leaves(loaded, state)
    assert list(loaded.optimizer.slots) == ["count", "a/b", "a", "like %2F"]
    with pytest.raises(ValueError, match=r"slots are \['a', 'a/b', .*'sgd.momentum'\]"):
        tk.load(path, optimizer=MOMENTUM)


def test_slots_of_another_dtype_or_shape_than_the_optimizers_are_refused(path: Path) -> None:
    state = _trained(_network(), MOMENTUM, CONFIG, 2)
    slots = state.optimizer.slots["sgd.momentum"]
    of_weight = r"slot 'sgd.momentum' of '0\.weight' has shape"
    for wrong, message in (
        (
            slots["0.weight"].double(),
            r"\(85,\) and torch.float64, those of sgd.* torch.float32",
        ),
        (slots["0.weight"][1:], r"\(84,\) and torch.float32, those of sgd\(.*\) \(85,\)"),
        (torch.tensor(0.0), r"\(\) and torch.float32, those of sgd"),
    ):
        changed = state.optimizer._replace(slots={"sgd.momentum": slots | {"0.weight": wrong}})
        tk.save(state._replace(optimizer=changed), path, CONFIG)
        with pytest.raises(ValueError, match=f"{of_weight} {message}"):
            tk.load(path, optimizer=MOMENTUM)
    lacking = {"sgd.momentum": {name: slot for name, slot in slots.items() if name != "0.bias"}}
    tk.save(state._replace(optimizer=state.optimizer._replace(slots=lacking)), path, CONFIG)
    with pytest.raises(ValueError, match=r"slots 'sgd.momentum' are of .*sgd.* of .*'0.bias'"):
        tk.load(path, optimizer=MOMENTUM)
