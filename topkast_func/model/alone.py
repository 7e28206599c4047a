"""Reading and running a model: in its turn, and without what torch.compile put into it."""

from collections.abc import Callable, Iterable
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn

from topkast_func.model.modules import modes
from topkast_func.turns import RANDOM_NUMBERS, Claims, in_turn

WRAPPERS = (
    torch.jit.ScriptModule,
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
)
"""Modules that `torch.func.functional_call` does not run, or not with what they are for."""

KEPT = "_sparse_weights"
"""Attribute of a layer, of the facade, that has sets of its own for some of its weights."""

SPARSE = (
    "the weights {} of the model have sets of their own, as tk.sparsify or a layer such as "
    "TopKastLinear gives them, and its forward pass would apply these beside those of a state: "
    "train it in an ordinary loop, or give a plain module, that loads sparsifier.dense_params(), "
    "say, with strict=False; tk.densify makes it plain, with α for weights"
)

Compiled = TypeVar("Compiled")
Result = TypeVar("Result")


def parts_of(model: object) -> list[Any]:
    """Return the parts of a module, itself the first; anything else alone."""
    return list(model.modules()) if isinstance(model, nn.Module) else [model]


def alone_with(model: object, run: Callable[[], Result], claims: Claims = frozenset()) -> Result:
    """Read or run a model in turn, as it is written.

    Args:
        model: A module, or anything else.
        run: A pure function, apart from what it does to the model and undoes.
        claims: What else it uses.

    Returns:
        What the function returns.
    """
    parts = parts_of(model)
    return in_turn(claim(parts) | claims, partial(as_written, parts, run))


def claim(parts: Iterable[object]) -> Claims:
    """Return the claim to a model: to each of its parts, since models may share some."""
    return frozenset(map(id, parts))


def may_draw(model: object) -> Claims:
    """Return a claim to the random numbers, unless the model is a module in evaluation mode."""
    evaluates = isinstance(model, nn.Module) and not any(modes(parts_of(model)))
    return frozenset() if evaluates else RANDOM_NUMBERS


def as_written(parts: Iterable[object], run: Callable[[], Result]) -> Result:
    """Run a function while parts that `torch.nn.Module.compile` has compiled are as written.

    What `torch.func` differentiates cannot be compiled inside; a step is compiled as a whole.

    Args:
        parts: The parts of a model.
        run: The function.

    Returns:
        What the function returns.
    """
    held = [vars(part) for part in parts if isinstance(part, nn.Module)]
    lent = [attributes for attributes in held if "_compiled_call_impl" in attributes]
    calls = [attributes.pop("_compiled_call_impl") for attributes in lent]
    try:
        return run()
    finally:
        for attributes, call in zip(lent, calls, strict=True):
            attributes["_compiled_call_impl"] = call


def uncompiled(model: Compiled) -> Compiled:
    """Return the module or function that torch.compile wrapped; anything else as it is.

    Args:
        model: A module, a function, or anything else.

    Returns:
        It, without that.

    Raises:
        TypeError: It is a module that does not run with other weights than its own.
    """
    if isinstance(model, WRAPPERS):
        raise TypeError(
            f"model is a {type(model).__name__}, which does not run with other weights than its "
            "own: give the module that is in it, or that it was made of"
        )
    if isinstance(model, nn.Module):
        return model._modules.get("_orig_mod", model)  # type: ignore[return-value]
    if isinstance(model, FunctionType):
        return vars(model).get("_torchdynamo_orig_callable", model)  # type: ignore[no-any-return]
    return model


def as_plain(model: Compiled) -> Compiled:
    """Return what `uncompiled` does, if its weights are what they seem to be.

    Args:
        model: A module, a function, or anything else.

    Returns:
        It, without what torch.compile made of it.

    Raises:
        TypeError: See `uncompiled`.
        ValueError: It has weights to be trained that have sets of their own.
    """
    found = uncompiled(model)
    if isinstance(found, nn.Module):
        names = {id(p): name for name, p in found.named_parameters() if p.requires_grad}
        held = [part._parameters.get(key) for part in found.modules() for key in _own_sets(part)]
        if sparse := dict.fromkeys(names[id(p)] for p in held if id(p) in names):
            raise ValueError(SPARSE.format([*sparse]))
    return found


def _own_sets(part: nn.Module) -> Iterable[str]:
    """Return the keys of the weights of a layer that have sets of their own."""
    keys: Iterable[str] = vars(part).get(KEPT, ())
    return keys


def check_uncompiled(model: object) -> None:
    """Check that no part of a module is one that torch.compile returned.

    Args:
        model: A module, or anything else.

    Raises:
        ValueError: One is; its weights would go by other names than those of the module in it.
    """
    if not isinstance(model, nn.Module):
        return
    compiled = [name for name, part in model.named_modules() if "_orig_mod" in part._modules]
    if compiled:
        raise ValueError(
            f"the parts {compiled} of the model are what torch.compile returned: put the modules "
            "themselves in their place (part._orig_mod); the step is compiled as a whole"
        )
