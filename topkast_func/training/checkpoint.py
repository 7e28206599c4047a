"""States on disk: safetensors with a small JSON header, written atomically."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from topkast_func.config import TopKastConfig
from topkast_func.config.allocation import allocate, given_sparsity
from topkast_func.masks import counts, is_of_blocks
from topkast_func.model.modules import check_names, frozen, trainable
from topkast_func.storage.compact import CompactWeights, compact
from topkast_func.storage.dense import DenseWeights
from topkast_func.training.optim import Optimizer, OptimizerState, slot_problem
from topkast_func.training.state import TrainState, Weights, dense_params, masks_of
from topkast_func.types import Masks, Model, Tensors

FORMAT, VERSION = "topkast_func state", 3


def save(state: TrainState, path: str | os.PathLike[str]) -> None:
    """Write a state to a safetensors file.

    The file appears whole or not at all: a process killed while saving leaves what was at
    ``path``. Tensors are named ``step``, ``seed``, ``mask_seed``, ``optimizer_step``,
    ``theta/NAME``, ``forward/NAME``, ``backward/NAME``, ``buffers/NAME``, ``frozen/NAME``,
    ``exponents/NAME`` and ``slots/KIND/NAME``, θ being φ where it has an exponent; the entry
    ``topkast_func`` of the metadata is a JSON object with the format, its version, the order of
    the tensors, the kinds of slots, the storage and, where that is compact, the names of the
    weights that kernels compute and the shapes of the values, places of B that are unused included.

    Args:
        state: The state, on any device.
        path: The file; its folder must exist.
    """
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in _flat(state)
    }
    header = {"format": FORMAT, "version": VERSION, "tensors": list(tensors)}
    header |= {"slots": list(state.optimizer.slots)}
    if isinstance(state.weights, CompactWeights):
        held = {name: list(state.weights.held[name].shape) for name in state.weights.theta}
        header |= {"storage": "compact", "layers": list(state.weights.patterns), "values": held}
    content = safetensors.torch.save(tensors, {"topkast_func": json.dumps(header)})
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str],
    config: TopKastConfig,
    model: Model | None = None,
    optimizer: Optimizer | None = None,
    *,
    device: torch.device | str = "cpu",
    theta_device: torch.device | str | None = None,
) -> TrainState:
    """Read a state that `save` wrote; training goes on from it bit for bit.

    Args:
        path: The file.
        config: The configuration the state was trained with; its sparse parameters and
            counts must be those of the file.
        model: If given, the state must have its parameters and buffers, shapes and dtypes.
        optimizer: If given, the state must have its slots.
        device: Where the tensors go; counters stay on the CPU.
        theta_device: Where θ rests in compact storage; None for ``device``.

    Returns:
        The state.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: ``model`` is neither a module nor a function.
        ValueError: The file is cut off or foreign, of a newer version, or of another
            configuration, model or optimiser.
    """
    try:
        header, tensors = _read(Path(path), device)
        if problem := _block_problem(header, tensors, config.block_shape):
            raise ValueError(f"{path} holds another state: {problem}")
        state = _state(header, tensors, config.block_shape, theta_device)
    except KeyError as reason:
        raise ValueError(f"{path} is damaged, so nothing was loaded: no {reason}") from reason
    problems = [_sparsity_problem(state, config), _slot_problem(state)]
    if model is not None:
        problems.append(_model_problem(state, model))
    if optimizer is not None:
        problems.append(_optimizer_problem(state, optimizer))
    if found := [problem for problem in problems if problem]:
        raise ValueError(f"{path} holds another state: {'; '.join(found)}")
    return state


def _flat(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    masks = masks_of(state)
    yield "step", state.step
    yield "seed", state.seed
    yield "mask_seed", state.mask_seed
    yield "optimizer_step", state.optimizer.step
    trees: dict[str, Mapping[str, Tensor]] = {
        "theta": state.weights.dense(),
        "forward": {name: sets.forward for name, sets in masks.items()},
        "backward": {name: sets.backward for name, sets in masks.items()},
        "buffers": state.buffers,
        "frozen": state.frozen,
        "exponents": state.exponents,
        **{f"slots/{kind}": tree for kind, tree in state.optimizer.slots.items()},
    }
    for prefix, tree in trees.items():
        for name, tensor in tree.items():
            yield f"{prefix}/{name}", tensor


def _state(
    header: dict[str, Any],
    tensors: Tensors,
    block_shape: tuple[int, int],
    theta_device: torch.device | str | None,
) -> TrainState:
    tree = partial(_tree, tensors)
    masks = _masks(tensors)
    kinds = header.get("slots", dict.fromkeys(key.split("/")[0] for key in tree("slots/")))
    slots = {kind: tree(f"slots/{kind}/") for kind in kinds}
    theta = tree("theta/")
    weights: Weights = DenseWeights(theta, masks)
    if header.get("storage") == "compact":
        stored = {name: shape[0] for name, shape in header.get("values", {}).items()}
        weights = compact(theta, masks, header["layers"], block_shape, theta_device, stored)
        if "values" not in header:
            slots = {kind: _within(slots[kind], weights.held) for kind in slots}
    return TrainState(
        step=tensors["step"].cpu(),
        seed=tensors["seed"].cpu(),
        mask_seed=tensors["mask_seed"].cpu(),
        weights=weights,
        buffers=tree("buffers/"),
        frozen=tree("frozen/"),
        optimizer=OptimizerState(tensors["optimizer_step"].cpu(), slots),
        exponents={name: exponent.cpu() for name, exponent in tree("exponents/").items()},
    )


def _tree(tensors: Tensors, prefix: str) -> Tensors:
    return {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}


def _masks(tensors: Tensors) -> dict[str, Masks]:
    backward = _tree(tensors, "backward/")
    return {n: Masks(forward, backward[n]) for n, forward in _tree(tensors, "forward/").items()}


def _within(slots: Tensors, held: Tensors) -> Tensors:
    """Leave out unused places of slots, in files that do not tell the shapes of the values."""
    return {name: slot[: len(held[name])] if slot.ndim else slot for name, slot in slots.items()}


def _read(path: Path, device: torch.device | str) -> tuple[dict[str, Any], Tensors]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no state at {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = _header(path, file.metadata())
            return header, {name: file.get_tensor(name).clone() for name in header["tensors"]}
    except SafetensorError as reason:
        raise ValueError(
            f"{path} is cut off or is not a safetensors file, so nothing was loaded: {reason}"
        ) from reason


def _header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    try:
        header = json.loads((metadata or {}).get("topkast_func", "{}"))
    except json.JSONDecodeError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not one that topkast_func saved")
    if not isinstance(header["version"], int) or header["version"] > VERSION:
        raise ValueError(
            f"{path} has format version {header['version']}; this topkast_func reads up to "
            f"{VERSION}: install a newer one"
        )
    return header


def _block_problem(
    header: Mapping[str, Any], tensors: Tensors, block_shape: tuple[int, int]
) -> str | None:
    shapes = header.get("values", {})
    for name in header.get("layers", ()):
        found = tuple(shapes.get(name, ())[1:] or (1, 1))
        if name in shapes and found != block_shape:
            return f"{name!r} has blocks of {found}, the configuration asks {block_shape}"
    for name, sets in _masks(tensors).items():
        if not all(is_of_blocks(mask, block_shape) for mask in sets):
            return f"the sets of {name!r} are not made of blocks of {block_shape}"
    return None


def _slot_problem(state: TrainState) -> str | None:
    values = state.weights.values()
    for kind, slots in state.optimizer.slots.items():
        if unknown := [name for name in slots if name not in values]:
            return f"slots {kind!r} are of {unknown}, which are no parameters"
    return None


def _sparsity_problem(state: TrainState, config: TopKastConfig) -> str | None:
    """Say what is not as the configuration has it, before or after a refresh that is due."""
    theta, masks, step = dense_params(state), masks_of(state), int(state.step)
    if problem := _difference("sparse parameters", masks, allocate(theta, config, step=step)):
        return problem
    exponents = {name: float(a) for name, a in state.exponents.items()}
    expected = {}
    if config.powerprop > 1.0:
        expected = dict.fromkeys(given_sparsity(theta, config), config.powerprop)
    if exponents != expected:
        return f"powerprop is {exponents or 1.0}, the configuration asks {config.powerprop}"
    problems = [_count_problem(theta, masks, config, t) for t in (max(step - 1, 0), step)]
    return problems[0] if all(problems) else None


def _count_problem(
    theta: Tensors, masks: Mapping[str, Masks], config: TopKastConfig, step: int
) -> str | None:
    for name, expected in counts(theta, config, step=step).items():
        found = tuple(int(mask.sum()) for mask in masks[name])
        if found != expected:
            return f"{name!r} has {found} entries in A and B, the configuration asks {expected}"
    return None


def _model_problem(state: TrainState, model: Model) -> str | None:
    if not isinstance(model, nn.Module):
        check_names(model, ())
        return None
    own_buffers = dict(model.named_buffers())
    given = {"parameters": trainable(model), "frozen": frozen(model), "buffers": own_buffers}
    found = {"parameters": dense_params(state), "frozen": state.frozen, "buffers": state.buffers}
    for what, tensors in given.items():
        if problem := _difference(f"{what} of the model", found[what], tensors):
            return problem
        for name, tensor in tensors.items():
            held = found[what][name]
            if held.shape != tensor.shape:
                return f"{name!r} has shape {tuple(held.shape)}, the model {tuple(tensor.shape)}"
            if held.dtype != tensor.dtype:
                return f"{name!r} has dtype {held.dtype}, the model {tensor.dtype}"
    return None


def _optimizer_problem(state: TrainState, optimizer: Optimizer) -> str | None:
    return slot_problem(state.optimizer.slots, state.weights.values(), optimizer)


def _difference(what: str, found: Iterable[str], expected: Iterable[str]) -> str | None:
    if set(found) == set(expected):
        return None
    missing, unknown = set(expected) - set(found), set(found) - set(expected)
    return f"{what}: missing {sorted(missing)}, unknown {sorted(unknown)}"
