"""States on disk: saved whole, and loaded where everything agrees."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topkast_func.checks import check_type
from topkast_func.config import TopKastConfig
from topkast_func.config.as_json import code_of, described, made, told
from topkast_func.devices import check_device
from topkast_func.files.container import damage_of, opened, write
from topkast_func.files.drafts import path_of, replacing
from topkast_func.model.alone import alone_with, as_plain
from topkast_func.model.modules import check_names, trainable
from topkast_func.training.agreement import disagreements
from topkast_func.training.fits_config import outlines
from topkast_func.training.optim import Optimizer, check_optimizer
from topkast_func.training.readout import theta_in
from topkast_func.training.state import TrainState, check_at_hand, check_one
from topkast_func.training.state_file import block_problem, flattened, restored
from topkast_func.training.stored import StoredState, stored
from topkast_func.types import Model


def save(
    state: TrainState, path: str | os.PathLike[str], config: TopKastConfig | None = None
) -> None:
    """Write a state, and how it is trained, to a safetensors file.

    The file appears whole or not at all, whatever is killed and however many threads and
    processes save to ``path``; where that is a symbolic link, what it points to is replaced.

    Its tensors are ``step``, ``seed``, ``mask_seed`` and ``optimizer_step``; ``theta/NAME``, θ,
    or φ where it has an exponent; ``backward/NAME``, B, and ``forward/NAME``, A among the entries
    of B in row-major order, each as `packed` has it; ``buffers/NAME``, ``frozen/NAME``,
    ``exponents/NAME``, ``narrow/NAME``; and ``slots/KIND/NAME``, KIND percent-encoded. Every byte
    is under a checksum. The header, JSON in the metadata, has beside what `write` puts there:

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
        TypeError: ``state``, ``path`` or ``config`` is none, or safetensors lacks a dtype.
        ValueError: The state is an ensemble, θ holds NaN, A is not within B, or the state is not
            one of ``config``; what was at ``path`` stays.
    """
    check_one(state)
    check_at_hand(state)
    header, tensors = taken_apart(state, config)
    with replacing(path_of("path", path)) as file:
        write(file, header, tensors)


def taken_apart(
    state: TrainState, config: TopKastConfig | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take a state apart for a file, its configuration included; see `save`.

    Args:
        state: The state, whole.
        config: The configuration, or None.

    Returns:
        The header and the tensors.

    Raises:
        TypeError: See `save`.
        ValueError: See `save`.
    """
    if config is not None:
        check_type("config", config, TopKastConfig)
    header, tensors = flattened(state)
    header["config"] = None
    if config is not None:
        header["config"] = described(vars(config))
        params = None if callable(config.sparse) else outlines(state.weights)
        if problems := disagreements(state, config, params=params):
            raise ValueError(f"the state is {problems[0]}")
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
        TypeError: ``path`` is no path, ``config`` no configuration, ``model`` neither a module nor
            a function, or ``optimizer`` none of this library.
        ValueError: The file is cut off, damaged or foreign, of another version, or of another
            configuration, model or optimiser; ``theta_device`` is given for dense storage; or a
            device is not there, or is the meta device.
    """
    if config is not None:
        check_type("config", config, TopKastConfig)
    if optimizer is not None:
        check_optimizer(optimizer)
    path = path_of("path", path)
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
    check_device("device", device)
    check_device("theta_device", theta_device)
    if theta_device is not None and parts.values is None:
        raise ValueError("theta_device is for compact storage: dense storage computes with θ")
    if problem := block_problem(parts, config.block_shape):
        raise ValueError(f"{path} holds a state of another configuration: {problem}")
    state = restored(parts, config.block_shape, device, theta_device)
    if problems := _problems(state, config, model, optimizer):
        raise ValueError(f"{path} holds a state {'; '.join(problems)}")
    return state


def load_config(path: str | os.PathLike[str]) -> TopKastConfig:
    """Read the configuration that `save` was given with a state.

    Args:
        path: The file; its tensors are not read.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: ``path`` is no path.
        ValueError: See `load`; or the file holds no configuration, or one with code.
    """
    path = path_of("path", path)
    with opened(path) as file:
        return agreed(path, file.header, None)


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
        found = described(vars(config))
        if untold := [name for name in found if name not in description]:
            raise ValueError(f"its configuration does not tell {untold}")
    if given is None:
        return config
    asked = described(vars(given))
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
) -> list[str]:
    model = None if model is None else as_plain(model)
    if model is not None and not isinstance(model, nn.Module):
        check_names(model, ())

    def found() -> list[str]:
        known = trainable(model).keys() == state.weights.shapes().keys()
        params = trainable(model) if known else theta_in(state)
        return disagreements(state, config, params=params, model=model, optimizer=optimizer)

    return found() if model is None else alone_with(model, found)
