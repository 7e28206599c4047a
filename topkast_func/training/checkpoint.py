"""States on disk: saved whole, and loaded where everything agrees."""

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topkast_func.config import TopKastConfig
from topkast_func.config.allocation import allocate, given_sparsity
from topkast_func.config.description import code_of, described, made, told
from topkast_func.files.container import damage_of, opened, write
from topkast_func.files.drafts import replacing
from topkast_func.masks import counts
from topkast_func.model.alone import alone_with, uncompiled
from topkast_func.model.modules import check_names, frozen, trainable
from topkast_func.training.optim import Optimizer, check_optimizer, slot_problem
from topkast_func.training.state import TrainState, dense_params, masks_of
from topkast_func.training.state_file import StoredState, block_problem, flattened, restored, stored
from topkast_func.types import Model, Params


def save(
    state: TrainState, path: str | os.PathLike[str], config: TopKastConfig | None = None
) -> None:
    """Write a state, and how it is trained, to a safetensors file.

    The file appears whole or not at all, whatever is killed and however many threads and
    processes save to ``path``; where that is a symbolic link, what it points to is replaced.

    Its tensors are ``step``, ``seed``, ``mask_seed`` and ``optimizer_step``; ``theta/NAME``, θ,
    or φ where it has an exponent; ``backward/NAME``, B, and ``forward/NAME``, A among the entries
    of B in row-major order, each as `packed` has it; ``buffers/NAME``, ``frozen/NAME``,
    ``exponents/NAME``; and ``slots/KIND/NAME``, KIND percent-encoded. Every byte is under a
    checksum. The header, JSON in the metadata, has beside what `write` puts there:

    - ``storage``, "compact" or "dense";
    - ``layers``, the names of the weights that kernels compute;
    - ``values``, in compact storage the shapes of the values of the sparse parameters, places of
      B that are unused included;
    - ``slots``, the kinds of slots;
    - ``config``, null or the configuration as `TopKastConfig.to_json` has it, a predicate or a
      method of one's own being {"code": its name}.

    Args:
        state: The state, on any device.
        path: The file; its folder must exist.
        config: The configuration it is trained with, so that `load` needs none.

    Raises:
        TypeError: ``config`` is no configuration, or a tensor has a layout or dtype that
            safetensors has not.
        ValueError: θ holds NaN, A is not within B, or the state is not one of ``config``; what
            was at ``path`` stays.
    """
    header, tensors = taken_apart(state, config)
    with replacing(Path(path)) as file:
        write(file, header, tensors)


def taken_apart(
    state: TrainState, config: TopKastConfig | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take a state apart for a file, its configuration included; see `save`.

    Args:
        state: The state.
        config: The configuration, or None.

    Returns:
        The header and the tensors.

    Raises:
        TypeError: See `save`.
        ValueError: See `save`.
    """
    check_config(config)
    header, tensors = flattened(state)
    header["config"] = None
    if config is not None:
        header["config"] = described(vars(config))
        theta = {name: tensors[f"theta/{name}"] for name in state.weights.shapes()}
        problem = None if callable(config.sparse) else _sparsity_problem(state, config, theta)
        if problem:
            raise ValueError(f"the state is not one of the configuration: {problem}")
    return header, tensors


def load(
    path: str | os.PathLike[str],
    config: TopKastConfig | None = None,
    model: Model | None = None,
    optimizer: Optimizer | None = None,
    *,
    device: torch.device | str = "cpu",
    theta_device: torch.device | str | None = None,
) -> TrainState:
    """Read a state that `save` wrote; training goes on from it bit for bit.

    Args:
        path: The file.
        config: The configuration the state was trained with; needed only where the file has
            none, or one with code, a predicate or a method of your own. A predicate is asked
            about the parameters of ``model`` if that is a module.
        model: If given, the state must have its parameters and buffers, shapes and dtypes.
        optimizer: If given, the state must have its slots, shapes and dtypes.
        device: Where the tensors go; counters stay on the CPU.
        theta_device: Where θ rests in compact storage; None for ``device``.

    Returns:
        The state.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: ``config`` is no configuration, ``model`` neither a module nor a function, or
            ``optimizer`` none of this library.
        ValueError: The file is cut off, damaged or foreign, of another version, or of another
            configuration, model or optimiser; or ``theta_device`` is given for dense storage.
    """
    check_config(config)
    if optimizer is not None:
        check_optimizer(optimizer)
    path = Path(path)
    with opened(path) as file:
        config = agreed(path, file.header, config)
        with damage_of(path):
            parts = stored(file.header, file.tensors())
    return put_together(path, parts, config, model, optimizer, device, theta_device)


def put_together(
    path: Path,
    parts: StoredState,
    config: TopKastConfig,
    model: Model | None,
    optimizer: Optimizer | None,
    device: torch.device | str,
    theta_device: torch.device | str | None,
) -> TrainState:
    """Put a state together where everything agrees.

    Args:
        path: Where it was, for errors.
        parts: Its parts.
        config: The configuration.
        model: See `load`.
        optimizer: See `load`.
        device: See `load`.
        theta_device: See `load`.

    Returns:
        The state.

    Raises:
        ValueError: See `load`.
    """
    if theta_device is not None and parts.values is None:
        raise ValueError("theta_device is for compact storage: dense storage computes with θ")
    problems = [block_problem(parts, config.block_shape)]
    if problems == [None]:
        state = restored(parts, config.block_shape, device, theta_device)
        problems = _problems(state, config, model, optimizer)
    if found := [problem for problem in problems if problem]:
        raise ValueError(f"{path} holds another state: {'; '.join(found)}")
    return state


def load_config(path: str | os.PathLike[str]) -> TopKastConfig:
    """Read the configuration that `save` was given with a state.

    Args:
        path: The file; its tensors are not read.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is cut off, damaged or foreign, of another version, or holds no
            configuration, or one with code.
    """
    with opened(Path(path)) as file:
        return agreed(Path(path), file.header, None)


def check_config(config: object) -> None:
    """Check that a configuration, if given, is one.

    Args:
        config: What is given.

    Raises:
        TypeError: It is neither a configuration nor None.
    """
    if config is not None and not isinstance(config, TopKastConfig):
        raise TypeError(f"config must be a TopKastConfig or None, got {type(config).__name__}")


def agreed(path: Path, header: Mapping[str, Any], given: TopKastConfig | None) -> TopKastConfig:
    """Return the configuration of a file, which is the one that is given if any is.

    Args:
        path: The file, for errors.
        header: Its header.
        given: The configuration that is given.

    Returns:
        The configuration.

    Raises:
        ValueError: There is none, or another than the one given; or the header is damaged.
    """
    description = header.get("config")
    if description is None:
        if given is None:
            raise ValueError(f"{path} was saved without its configuration: pass it as config")
        return given
    with damage_of(path):
        code = code_of(description)
    if code and given is None:
        raise ValueError(f"{path} cannot hold code, and {told(code)}: pass config, with it")
    with damage_of(path):
        config = made(TopKastConfig, description, {name: getattr(given, name) for name in code})
    if given is None:
        return config
    found, asked = described(vars(config)), described(vars(given))
    found |= {name: description[name] for name in code if name not in code_of(asked)}
    if differing := [name for name in asked if found[name] != asked[name]]:
        sides = (f"{name} is {found[name]!r} and not {asked[name]!r}" for name in differing)
        raise ValueError(
            f"{path} was saved with another configuration than the one given: {'; '.join(sides)}. "
            "Load it without; training may go on with another"
        )
    return given


def _problems(
    state: TrainState, config: TopKastConfig, model: Model | None, optimizer: Optimizer | None
) -> list[str | None]:
    model = None if model is None else uncompiled(model)
    of_model = None if model is None else alone_with(model, partial(_model_problem, state, model))
    known = isinstance(model, nn.Module) and of_model is None
    of_sets = _sparsity_problem(state, config, trainable(model) if known else dense_params(state))
    if of_sets and callable(config.sparse) and not known:
        of_sets += " (the predicate was asked about plain tensors: pass the module as model)"
    of_optimizer = None if optimizer is None else _optimizer_problem(state, optimizer)
    return [of_sets, of_model, of_optimizer]


def _sparsity_problem(state: TrainState, config: TopKastConfig, params: Params) -> str | None:
    """Say what is not as the configuration has it, before or after a refresh that is due."""
    masks, step = masks_of(state), int(state.step)
    try:
        selected = allocate(params, config, step=step)
        powered = given_sparsity(params, config) if config.powerprop > 1.0 else []
        due = [counts(params, config, step=t) for t in (max(step - 1, 0), step)]
    except (TypeError, ValueError) as reason:
        return str(reason)
    if problem := _difference("sparse parameters", masks, selected):
        return problem
    exponents = {name: float(exponent) for name, exponent in state.exponents.items()}
    if exponents != dict.fromkeys(powered, config.powerprop):
        return f"powerprop is {exponents or 1.0}, the configuration asks {config.powerprop}"
    sizes = {n: tuple(int(mask.count_nonzero()) for mask in both) for n, both in masks.items()}
    problems = [_count_problem(sizes, expected) for expected in due]
    return problems[0] if all(problems) else None


def _count_problem(
    sizes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, int]]
) -> str | None:
    for name, asked in expected.items():
        if sizes[name] != asked:
            return f"{name!r} has {sizes[name]} entries in A and B, the configuration asks {asked}"
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
