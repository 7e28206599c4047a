"""Files whose checksums fit and whose content breaks a rule: each is one error."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topkast_func as tk
from topkast_func.files import container
from topkast_func.training import state_file, stored

Header = dict[str, Any]
Named = dict[str, Tensor]
Edit = Callable[[Header, Named], object]

CONFIG = tk.TopKastConfig(0.75, 0.5)


def _network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Conv1d(4, 4, 2), nn.Linear(8, 3))
    model[2].bias.requires_grad_(False)
    model[2].register_buffer("wave", torch.tensor([1j]))
    return model


def _saved(path: Path, storage: Any = "compact", config: tk.TopKastConfig = CONFIG) -> Path:
    tk.save(tk.init_state(_network(), config, tk.adam(), storage=storage), path, config)
    return path


def _forge(path: Path, edit: Edit) -> None:
    """Write the file anew with its header or its tensors edited."""
    with container.opened(path) as file:
        header, tensors = file.header, file.tensors()
    edit(header, tensors)
    with path.open("wb") as stream:
        container.write(stream, header, tensors)


def _moved_within_b(header: Header, tensors: Named) -> None:
    """Give A one entry more."""
    bits = tensors["forward/0.weight"]
    free = int((~bits[0] & 255).item())
    bits[0] += free & -free


def _let_be_complex(header: Header, tensors: Named, name: str) -> None:
    tensors[name] = tensors[name] * 1j
    header["complex"].append(name)


THETA = "theta/0.weight"
COMPACT: list[tuple[Edit, str]] = [
    (lambda h, t: t.update(step=torch.tensor(-1)), "step is -1, not an int64 number of at least 0"),
    (lambda h, t: t.update(mask_seed=torch.tensor(-2)), "mask_seed is -2, not an int64"),
    (lambda h, t: t.update(seed=torch.tensor(-(2**63))), "seed is -9223372036854775808, not an"),
    (lambda h, t: t.update(optimizer_step=torch.tensor(-7)), "optimizer_step is -7, not an int64"),
    (lambda h, t: t.update(step=torch.tensor(1.0)), "step is 1.0, not an int64"),
    (lambda h, t: t.update(step=torch.tensor([1])), r"step is tensor\(\[1\]\), not an int64"),
    (lambda h, t: t.update(step=torch.tensor(1).int()), "step is 1, not an int64"),
    (lambda h, t: t.pop("seed"), "seed is None, not an int64"),
    (lambda h, t: t[THETA].view(-1)[3:4].fill_(math.nan), r"theta/0\.weight holds NaN"),
    (lambda h, t: t["theta/1.bias"].fill_(math.nan), r"theta/1\.bias holds NaN"),
    (lambda h, t: t.update({THETA: t[THETA].int()}), r"theta/0.weight is torch.int32 of shape"),
    (lambda h, t: t.update({THETA: t[THETA].to(torch.float8_e5m2)}), "theta/0.weight is torch.fl"),
    (lambda h, t: t.update({THETA: t[THETA][:0]}), r"theta/0.weight is .* of shape \(0, 10\)"),
    (lambda h, t: _let_be_complex(h, t, THETA), r"theta of \['0.weight'\] is complex and sparse"),
    (lambda h, t: [t.pop(n) for n in [*t] if n.startswith("theta/")], "it has no theta"),
    (lambda h, t: t.pop(THETA), r"backward has \['0.weight'\], which are no such parameters"),
    (lambda h, t: t.pop("theta/0.bias"), r"slots/adam.exp_avg has \['0.bias'\], which are no such"),
    (lambda h, t: t.pop("forward/0.weight"), r"A is of \['1.weight', '2.weight'\], B of \['0"),
    (lambda h, t: t.update({"backward/0.weight": t["backward/0.weight"][1:]}), "backward/0.weight"),
    (lambda h, t: t.update({"forward/0.weight": torch.ones(1)}), "forward/0.weight is torch.float"),
    (lambda h, t: t["forward/0.weight"].fill_(255), "0.weight.* entries in A and B"),
    (lambda h, t: t["forward/0.weight"].zero_(), r"'0.weight' has \(0, 40\) entries in A and B"),
    (lambda h, t: t["backward/0.weight"].zero_(), "forward/0.weight is .* no set among 0 ent"),
    (_moved_within_b, r"'0.weight' has \(21, 40\) entries in A and B, .* asks for \(20, 40\)"),
    (
        lambda h, t: t.update({"frozen/0.weight": torch.ones(1)}),
        "'0.weight'.* both frozen and trained",
    ),
    (lambda h, t: t.update({"exponents/0.weight": torch.tensor(2.0)}), "exponents/0.weight is not"),
    (
        lambda h, t: t.update({"exponents/x": torch.tensor(2.0)}),
        r"exponents has \['x'\], which are",
    ),
    (
        lambda h, t: t.update({"exponents/0.weight": torch.tensor(math.nan).double()}),
        "exponents/0.weight is not a float64 number above 1",
    ),
    (
        lambda h, t: t.update({"exponents/0.weight": torch.tensor(2.0).double()}),
        "powerprop is {'0.weight': 2.0}, the configuration asks for 1.0",
    ),
    (lambda h, t: t.update({"narrow/x": torch.ones(0).half()}), r"narrow has \['x'\], which are"),
    (lambda h, t: t.update({"narrow/0.bias": torch.ones(1).half()}), "narrow/0.bias is no empty"),
    (lambda h, t: t.update({"narrow/0.bias": torch.ones(0).double()}), "narrow/0.bias is no empty"),
    (lambda h, t: t.update({"narrow/0.bias": torch.ones(0).int()}), "narrow/0.bias is no empty"),
    (
        lambda h, t: t.update({"slots/adam.exp_avg/x": torch.ones(1)}),
        r"slots/adam.exp_avg has \['x'\], which",
    ),
    (
        lambda h, t: t.update({"slots/other/0.bias": torch.ones(8)}),
        "no state has a tensor slots/ot",
    ),
    (lambda h, t: t.update(theta=torch.ones(1)), "no state has a tensor theta"),
    (lambda h, t: h.update(slots=["adam.exp_avg"]), "no state has a tensor slots/adam.exp_avg_sq"),
    (lambda h, t: h.update(slots=["adam.exp_avg", "adam.exp_avg"]), "its slots .* name one twice"),
    (
        lambda h, t: h.update(slots="adam.exp_avg"),
        "its slots are 'adam.exp_avg', not a list",
    ),
    (lambda h, t: h.update(layers=[3]), r"its layers are \[3\], not a list of names"),
    (lambda h, t: h.update(layers=["0.weight", "0.weight"]), "its layers .* name one twice"),
    (lambda h, t: h.update(layers=["0.bias"]), r"layers has \['0.bias'\], which are no such"),
    (lambda h, t: h.pop("layers"), "its layers are None, not a list"),
    (lambda h, t: h.update(storage="tape"), "its storage is 'tape'"),
    (lambda h, t: h.update(storage="dense"), "its storage is 'dense', with values of"),
    (lambda h, t: h.pop("storage"), "its storage is None"),
    (lambda h, t: h.pop("values"), "its storage is 'compact', with values of None"),
    (lambda h, t: h["values"].pop("0.weight"), "its storage is 'compact', with values of"),
    (lambda h, t: h["values"].update(x=[3]), "its storage is 'compact', with values of"),
    (
        lambda h, t: h["values"].update({"0.weight": [10**9]}),
        r"\[1000000000\], of 40 to 80 entries",
    ),
    (
        lambda h, t: h["values"].update({"0.weight": [39]}),
        r"have shape \[39\], of 40 to 80 entries",
    ),
    (lambda h, t: h["values"].update({"0.weight": [40.0]}), r"have shape \[40.0\]"),
    (lambda h, t: h["values"].update({"0.weight": 40}), "have shape 40"),
    (lambda h, t: h["values"].update({"0.weight": [8, 5]}), r"have shape \[8, 5\]"),
    (lambda h, t: h["values"].update({"0.weight": []}), r"have shape \[\]"),
    (
        lambda h, t: h["values"].update({"0.weight": [10, 2, 2]}),
        r"'0.weight' has blocks of \(2, 2\)",
    ),
    (
        lambda h, t: h["values"].update({"1.weight": [4, 2, 2]}),
        r"'1.weight' has blocks of \(2, 2\)",
    ),
    (lambda h, t: h.update(config=[]), r"a configuration must be a JSON object, got \[\]"),
    (lambda h, t: h.update(config="x" * 10**6), "a configuration must be a JSON object"),
    (lambda h, t: h["config"].update(sparse={"code": "x" * 10**6}), "sparse is the code of xxx"),
    (lambda h, t: h["config"].update(sparse={"code": 3}), "sparse must be None, a glob"),
    (lambda h, t: h["config"].update(sparsity=1), r"TopKastConfig has no \['sparsity'\]"),
    (lambda h, t: h["config"].update(powerprop=10**400), "too large"),
    (lambda h, t: h["config"].update(method={"name": "rigl", "x": 1}), r"rigl has no \['x'\]"),
    (lambda h, t: h["config"].update(backward_sparsity=0.8), "backward_sparsity must be in"),
    (lambda h, t: h["config"].update(block_shape=[2, 2]), "block"),
]


@pytest.mark.parametrize(("edit", "message"), COMPACT, ids=range(len(COMPACT)))
def test_what_no_state_is_like_is_refused(edit: Edit, message: str, tmp_path: Path) -> None:
    path = _saved(tmp_path / "state")
    _forge(path, lambda header, tensors: None)
    tk.load(path, None, _network(), tk.adam())
    _forge(path, edit)
    with pytest.raises(
        ValueError, match=rf"state (is dama|holds a state of ano|cannot).*{message}"
    ) as info:
        tk.load(path)
    assert len(str(info.value)) < 1000


def _reshape_blocks(shape: list[int], header: Header, tensors: Named) -> None:
    header["config"]["block_shape"] = shape


@pytest.mark.parametrize("storage", ["compact", "dense"])
def test_blocks_of_another_shape_are_refused(storage: Any, tmp_path: Path) -> None:
    config = tk.TopKastConfig(0.75, 0.5, sparse="0.weight", block_shape=(2, 2))
    path = _saved(tmp_path / "state", storage, config)
    tk.load(path)
    for shape in ([4, 2], [3, 3], [2, 1000]):
        _forge(path, partial(_reshape_blocks, shape))
        with pytest.raises(
            ValueError, match=r"'0.weight' has blocks of|the sets of '0.weight' are n"
        ):
            tk.load(path)


def test_dense_storage_has_no_values(tmp_path: Path) -> None:
    path = _saved(tmp_path / "state", "dense")
    for edit in (
        lambda header, _: header.update(values={"0.weight": [40]}),
        lambda header, _: header.update(values={}),
        lambda header, _: header.update(storage="compact"),
    ):
        _saved(path, "dense")
        _forge(path, edit)
        with pytest.raises(ValueError, match=r"its storage is '(dense|compact)', with values of"):
            tk.load(path)


@pytest.mark.parametrize("storage", ["compact", "dense"])
def test_sets_of_which_a_is_not_within_b_are_not_saved(storage: Any, tmp_path: Path) -> None:
    state = tk.init_state(_network(), CONFIG, tk.adam(), storage=storage)
    masks = tk.masks_of(state)["0.weight"]
    turned = {**tk.masks_of(state), "0.weight": tk.Masks(masks.backward, masks.forward)}
    with pytest.raises(ValueError, match=r"A of '0\.weight' is not within B"):
        state_file.flattened(_with_masks(state, turned))


def _with_masks(state: tk.TrainState, masks: dict[str, tk.Masks]) -> tk.TrainState:
    class Other(type(state.weights)):  # type: ignore[misc]
        def masks(self) -> dict[str, tk.Masks]:
            return masks

    return state._replace(weights=Other(*state.weights))  # type: ignore[misc]


@pytest.mark.parametrize("storage", ["compact", "dense"])
def test_what_is_taken_apart_is_put_together_again(storage: Any) -> None:
    config = tk.TopKastConfig(0.75, 0.5, block_shape=(2, 1))
    state = tk.init_state(_network(), config, tk.adam(), storage=storage)
    header, tensors = state_file.flattened(state)
    parts = stored.stored(header, tensors)
    assert state_file.block_problem(parts, (2, 1)) is None
    again, same = state_file.flattened(state_file.restored(parts, (2, 1), "cpu", None))
    assert again == header
    assert list(same) == list(tensors)
    assert all(torch.equal(same[name], tensors[name]) for name in tensors)
