"""States on disk: round trips, resumed runs, kills, and files of others."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import topkast_func as tk
from tests.storage import STORAGES, dense_slots

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
    leaves = [tree_flatten((s.weights.values(), s.optimizer))[0] for s in (one, other)]
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
    values = state.weights.values()
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


def test_a_state_that_holds_nan_comes_back(path: Path) -> None:
    model, bad = _network(), torch.full((3, 13), math.nan)
    step = tk.make_train_step(model, _square, CONFIG, MOMENTUM, compile=False)
    state, metrics = step(tk.init_state(model, CONFIG, MOMENTUM), bad)
    assert metrics.loss.isnan()
    tk.save(state, path)
    loaded = tk.dense_params(tk.load(path, CONFIG, model, MOMENTUM))
    assert loaded["0.bias"].isnan().all()


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
    tk.save(state, path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["topkast_func"])
        assert (header["format"], header["version"]) == ("topkast_func state", 3)
        assert (header["storage"], header["layers"]) == ("compact", ["0.weight", "6.weight"])
        assert set(header["tensors"]) == set(file.keys())
        theta = file.get_tensor("theta/0.weight")
        assert torch.equal(theta, tk.dense_params(state)["0.weight"])
        slot = file.get_tensor("slots/sgd.momentum/0.weight")
        assert torch.equal(slot, state.optimizer.slots["sgd.momentum"]["0.weight"])


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
        assert all(map(torch.equal, metrics, metrics_again))
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


def test_a_file_of_version_1_is_a_state_in_dense_storage(path: Path) -> None:
    """What the first release wrote: no storage in the header, slots in the shape of θ."""
    model = nn.Linear(13, 4)
    state = tk.init_state(model, CONFIG, MOMENTUM, storage="dense")
    masks = tk.masks_of(state)["weight"]
    theta = {f"theta/{n}": t.contiguous() for n, t in tk.dense_params(state).items()}
    tensors = {
        "step": torch.tensor(4),
        "seed": torch.tensor(5),
        "optimizer_step": torch.tensor(4),
        **theta,
        "forward/weight": masks.forward,
        "backward/weight": masks.backward,
        "slots/sgd.momentum/weight": torch.randn(4, 13) * masks.backward,
        "slots/sgd.momentum/bias": torch.randn(4),
    }
    header = {"format": "topkast_func state", "version": 1, "tensors": list(tensors)}
    safetensors.torch.save_file(tensors, path, {"topkast_func": json.dumps(header)})
    loaded = tk.load(path, CONFIG, model, MOMENTUM)
    assert (int(loaded.step), int(loaded.seed), int(loaded.optimizer.step)) == (4, 5, 4)
    assert type(loaded.weights) is type(state.weights)
    for name, parameter in model.named_parameters():
        assert torch.equal(tk.dense_params(loaded)[name], parameter)
        slot = loaded.optimizer.slots["sgd.momentum"][name]
        assert torch.equal(slot, tensors[f"slots/sgd.momentum/{name}"])
    assert torch.equal(tk.masks_of(loaded)["weight"].forward, masks.forward)
    step = tk.make_train_step(model, _square, CONFIG, MOMENTUM, compile=False)
    after, _ = step(loaded, _batches(1)[0])
    assert not torch.equal(tk.dense_params(after)["weight"], model.weight)


def test_theta_of_a_compact_state_rests_where_it_is_told(path: Path) -> None:
    state = _trained(_network(), MOMENTUM, CONFIG, 2)
    tk.save(state, path)
    assert _differing(tk.load(path, CONFIG, theta_device="cpu"), state) == []


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
    """What a kill at the last moment would leave: seen from within the call to fsync."""
    old, new = (_trained(_network(), MOMENTUM, CONFIG, steps) for steps in (1, 2))
    tk.save(old, path)
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(tk.load(path, CONFIG)))
    tk.save(new, path)
    assert [_differing(state, old) for state in seen] == [[]]
    assert _differing(tk.load(path, CONFIG), new) == []
    assert list(path.parent.iterdir()) == [path]


# --- files that must be refused ----------------------------------------------------------


@pytest.fixture
def saved(path: Path) -> Path:
    tk.save(_trained(_network(), MOMENTUM, CONFIG, 4), path)
    return path


def _header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["topkast_func"])
    return found


def _rewrite(path: Path, header: str) -> None:
    """Replace the JSON header of a state file, leaving its tensors."""
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, {"topkast_func": header})


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no state at"):
        tk.load(tmp_path, CONFIG)


def test_a_missing_file_is_not_found(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no state at .*state\.safetensors"):
        tk.load(path, CONFIG)


@pytest.mark.parametrize("share", [0.0, 1e-3, 2e-3, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"state\.safetensors is cut off or is not"):
        tk.load(saved, CONFIG)


def test_a_file_that_lacks_its_last_byte_or_has_one_more_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for wrong in (content[:-1], content + b"\0"):
        saved.write_bytes(wrong)
        with pytest.raises(ValueError, match="is cut off or is not a safetensors file"):
            tk.load(saved, CONFIG)


@pytest.mark.parametrize("size", [1, 8, 100, 10_000])
def test_random_bytes_are_refused(path: Path, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    noise = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    path.write_bytes(noise.numpy().tobytes())
    with pytest.raises(ValueError, match="is cut off or is not a safetensors file"):
        tk.load(path, CONFIG)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_a_safetensors_file_of_someone_else_is_refused(
    path: Path, metadata: dict[str, str] | None
) -> None:
    safetensors.torch.save_file({"weight": torch.ones(2, 2)}, path, metadata)
    with pytest.raises(ValueError, match="but not one that topkast_func saved"):
        tk.load(path, CONFIG)


@pytest.mark.parametrize("header", ["no JSON", "[]", "1", '{"format": "another"}', "{}"])
def test_a_header_that_topkast_func_did_not_write_is_refused(saved: Path, header: str) -> None:
    _rewrite(saved, header)
    with pytest.raises(ValueError, match="but not one that topkast_func saved"):
        tk.load(saved, CONFIG)


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ({}, "version"),
        ({"version": 1}, "tensors"),
        ({"version": 1, "tensors": ["step"]}, "seed"),
    ],
)
def test_a_damaged_header_is_refused(saved: Path, header: dict[str, Any], what: str) -> None:
    _rewrite(saved, json.dumps({"format": "topkast_func state", **header}))
    with pytest.raises(ValueError, match=f"is damaged, so nothing was loaded: no '{what}'"):
        tk.load(saved, CONFIG)


def test_a_newer_version_is_refused_whatever_else_it_holds(saved: Path) -> None:
    _rewrite(saved, json.dumps({"format": "topkast_func state", "version": 4}))
    with pytest.raises(ValueError, match="format version 4; this topkast_func reads up to 3"):
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
        (_frozen_elsewhere, r"parameters of the model: .*unknown \['0\.bias', '0\.weight'\]"),
        (_frozen_nowhere, r"parameters of the model: missing \['4\.bias', '4\.weight'\]"),
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
    with pytest.raises(ValueError, match=f"holds another state: .*{message}"):
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
            r"sparse parameters: missing \[\], unknown \['6\.weight'\]",
        ),
        (
            tk.TopKastConfig(0.75, 0.5, sparse="*.weight"),
            r"sparse parameters: missing \['1\.weight'\], unknown \[\]",
        ),
    ],
)
def test_the_state_of_another_configuration_is_refused(
    saved: Path, config: tk.TopKastConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=f"holds another state: .*{message}"):
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
    with pytest.raises(ValueError, match=r"has \(42, 85\) entries in A and B, .* asks \(42, 42\)"):
        tk.load(path, tk.TopKastConfig(0.75, 0.5, explore_until=3))


def test_every_problem_of_a_file_is_named_at_once(saved: Path) -> None:
    config = tk.TopKastConfig(0.8, 0.5)
    with pytest.raises(ValueError, match=r"entries in A and B.*missing.*slots are"):
        tk.load(saved, config, _deeper(), OPTIMIZERS["adam"])


def test_blocks_are_counted_whole(path: Path) -> None:
    config = tk.TopKastConfig(0.75, 0.5, block_shape=(2, 2))
    state = tk.init_state({"weight": torch.randn(6, 6)}, config, MOMENTUM)
    tk.save(state, path)
    assert _differing(tk.load(path, config), state) == []
    with pytest.raises(ValueError, match=r"has blocks of \(2, 2\), .* asks \(1, 1\)"):
        tk.load(path, CONFIG)
    fewer = tk.TopKastConfig(0.75, 0.75, block_shape=(2, 2))
    with pytest.raises(ValueError, match=r"has \(8, 20\) entries in A and B.* asks \(8, 8\)"):
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
    shapes = {name: value.shape for name, value in state.weights.values().items()}
    assert {name: value.shape for name, value in loaded.weights.values().items()} == shapes
    assert tk.explain(loaded) == tk.explain(state)


def test_a_file_that_does_not_tell_the_shapes_of_the_values_is_read(path: Path) -> None:
    state = _explored()
    tk.save(state, path)
    header = _header(path)
    del header["values"]
    _rewrite(path, json.dumps(header))
    loaded = tk.load(path, tk.TopKastConfig(0.75, 0.5, refresh_every=3, explore_until=2))
    assert _differing(loaded, state) == []


def test_slots_that_do_not_fit_the_values_are_refused(saved: Path) -> None:
    header = _header(saved)
    del header["storage"], header["layers"], header["values"]
    _rewrite(saved, json.dumps(header))
    with pytest.raises(ValueError, match=r"slot 'sgd.momentum' of '0\.weight' has shape"):
        tk.load(saved, CONFIG, optimizer=MOMENTUM)
    tensors = safetensors.torch.load_file(saved)
    names = {
        name: name.replace("sgd.momentum/0.weight", "sgd.momentum/9.weight") for name in tensors
    }
    header["tensors"] = list(names.values())
    renamed = {names[name]: tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, saved, {"topkast_func": json.dumps(header)})
    with pytest.raises(ValueError, match=r"slots 'sgd.momentum' are of \['9\.weight'\]"):
        tk.load(saved, CONFIG)
