"""What a module holds, and how it runs with other tensors in their place."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn
from torch.func import functional_call
from torch.nn.modules import module as torch_module

from topkast_func.reading import plain, versions
from topkast_func.types import Model, Params, Tensors

CHANGED = (
    "the forward pass changes parameters {}: use the result of the change, or register what "
    "changes as a buffer. Unless this was a first step, which is tried on copies, the state that "
    "was given may hold the change: go on from one that was saved"
)

UNTIED = (
    "the forward pass puts another tensor in the place of one of {}, which are one tensor by two "
    "names and would be two from then on: write to it, or register each as a buffer of its own"
)

REPLACED = (
    "{!r} of the model is an nn.Parameter no more: torch.func.functional_call leaves its tensors "
    "in a module that is reached under two names. Put a Parameter back, and let a copy of the "
    "model run with forward_params(state)"
)


def bind(
    model: Model, tied: Mapping[str, str], alpha: Params, constant: Params, buffers: Tensors
) -> Callable[..., Any]:
    """Return ``apply(*inputs, **options)``: the model at the given tensors.

    Args:
        model: A module or a pure function.
        tied: What `ties` returns for it.
        alpha: Weights by name.
        constant: Frozen parameters by name, where ``alpha`` has none.
        buffers: Buffers by name; the mapping then holds what the module wrote or assigned.

    Returns:
        The bound model. It raises ValueError where a module writes to a tensor that is no buffer,
        or puts another tensor in the place of a tied one.
    """
    if not isinstance(model, nn.Module):
        return lambda *inputs, **options: model({**alpha}, *inputs, **options)

    def apply(*inputs: Any, **options: Any) -> Any:
        tensors = {**constant, **alpha, **buffers}
        tensors.update({other: tensors[name] for other, name in tied.items()})
        fixed = {name: tensors[name] for name in (*constant, *alpha) if name not in buffers}
        before = versions(fixed)
        result = functional_call(model, tensors, inputs, options, tie_weights=False)
        if before != (after := versions(fixed)):
            changed = [name for name, version in after.items() if version != before[name]]
            raise ValueError(CHANGED.format(changed))
        if untied := [pair for pair in tied.items() if len({id(tensors[n]) for n in pair}) > 1]:
            raise ValueError(UNTIED.format(untied))
        buffers.update({name: tensors[name] for name in buffers})
        return result

    return apply


def ties(model: object) -> dict[str, str]:
    """Return the further names of tied parameters and buffers, with their first ones.

    `torch.func.functional_call` ties by itself, but leaves its tensors in a module that is
    reached under two names; here such a module counts once. A parameter that is registered as a
    buffer too goes by its name as a parameter.

    Args:
        model: A module; anything else has none.

    Returns:
        First names by further names.
    """
    if not isinstance(model, nn.Module):
        return {}
    first: dict[int, str] = {}
    tied = {}
    modules = [*model.named_modules()]
    held = [(path, module._parameters) for path, module in modules]
    held += [(path, module._buffers) for path, module in modules]
    for path, tensors in held:
        for key, tensor in tensors.items():
            name = f"{path}.{key}".lstrip(".")
            if tensor is not None and first.setdefault(id(tensor), name) != name:
                tied[name] = first[id(tensor)]
    return tied


def trainable(model: object) -> Tensors:
    """Return the parameters of a module that require a gradient, by name; others have none."""
    if not isinstance(model, nn.Module):
        return {}
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def frozen(model: object) -> Tensors:
    """Return the parameters of a module that require no gradient, by name; others have none."""
    if not isinstance(model, nn.Module):
        return {}
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


def buffers_of(model: object) -> Tensors:
    """Return the buffers of a module that are no parameters too, by name; others have none."""
    if not isinstance(model, nn.Module):
        return {}
    parameters = {id(parameter) for parameter in model.parameters()}
    return {name: b for name, b in model.named_buffers() if id(b) not in parameters}


def buffers(model: object, given: Params | None = None) -> Tensors:
    """Copy the buffers of a module, by name; any other model has none.

    Args:
        model: A module, or anything else.
        given: Tensors to copy in place of the buffers of the same name.

    Returns:
        The copies.
    """
    own = buffers_of(model)
    held = {**own, **(given or {})}
    return {name: plain(held[name].detach()).clone() for name in own}


def parameters_of(model: object) -> dict[str, tuple[nn.Module, str]]:
    """Return the parameters of a module by name, tied ones by each: where they are, their key."""
    if not isinstance(model, nn.Module):
        return {}
    return {
        f"{path}.{key}".lstrip("."): (module, key)
        for path, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


def check_parameters(model: object) -> None:
    """Check that the parameters of a module are some.

    Args:
        model: A module, or anything else.

    Raises:
        ValueError: One is another tensor.
    """
    for name, (module, key) in parameters_of(model).items():
        if not isinstance(module._parameters[key], nn.Parameter):
            raise ValueError(REPLACED.format(name))


def unset_buffers(model: object) -> dict[str, tuple[nn.Module, str]]:
    """Return the buffers of a module that are None, by name: where they are, and their key."""
    if not isinstance(model, nn.Module):
        return {}
    return {
        f"{path}.{key}".lstrip("."): (module, key)
        for path, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is None
    }


def modes(parts: Iterable[object]) -> tuple[bool, ...]:
    """Return the ``training`` flag of every part of a module; anything else has none."""
    return tuple(part.training for part in parts if isinstance(part, nn.Module))


def hooks(parts: Iterable[object]) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of the hooks of all modules, and of those of every part of a module.

    Args:
        parts: The parts; anything else has no hooks of its own.

    Returns:
        The numbers, which no two hooks have in common.
    """
    of_all = (
        *torch_module._global_forward_pre_hooks,
        *torch_module._global_forward_hooks,
        *torch_module._global_backward_pre_hooks,
        *torch_module._global_backward_hooks,
    )
    return of_all, *(
        (*m._forward_pre_hooks, *m._forward_hooks, *m._backward_pre_hooks, *m._backward_hooks)
        for m in parts
        if isinstance(m, nn.Module)
    )


def tensors_of(model: object) -> Tensors:
    """Return the parameters and buffers of a module, by name; others have none."""
    if not isinstance(model, nn.Module):
        return {}
    return {**dict(model.named_parameters()), **buffers_of(model)}


def check_names(model: Model, names: Collection[str]) -> None:
    """Check that parameter names fit a model.

    Args:
        model: A module, or a pure function (which takes any names).
        names: The names.

    Raises:
        TypeError: The model is not callable.
        ValueError: A trainable parameter of the module is missing, or a name is unknown.
    """
    if not callable(model):
        raise TypeError(f"model must be a module or a function, got {type(model).__name__}")
    if not isinstance(model, nn.Module):
        return
    known = tensors_of(model)
    missing = sorted(name for name in trainable(model) if name not in names)
    unknown = sorted(name for name in names if name not in known)
    if missing or unknown:
        raise ValueError(
            f"the parameters are not those of the model: missing {missing}, unknown {unknown}"
        )
