"""torch.compile for a pure step: one graph, or an error that says why not."""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_flatten, tree_map_only

from topkast_func import compiling
from topkast_func.reading import dispatches
from topkast_func.warn import warn_caller

ONE_GRAPH: Mapping[str, Any] = {"fullgraph": True, "dynamic": False}
"""Shapes are static: dropout under `torch.func.grad` cannot be traced with dynamic ones."""

COMPILES_FROM = "2.11"
"""First version of torch that compiles the step, of those that it was tried with."""

KEPT = (
    "the forward pass or loss_fn keeps a tensor where it is not passed on, in an attribute of the "
    "model say: return it"
)
EAGER = "train_step runs eager, on small models several times slower: {}"
ALONE = (
    "this rank cannot compile train_step: {}. Mend that, or pass make_train_step(..., "
    "compile=False) on all ranks"
)
BROKEN = (
    "the model or loss_fn breaks the graph of train_step: take the break out, or pass "
    "make_train_step(..., compile={{'fullgraph': False}}) or compile=False. The break: {}"
)
EAGER_ALONE = (
    "the model or loss_fn runs in eager mode, and not compiled: pass make_train_step(..., "
    "compile=False). The reason: {}"
)
SHAPES = (
    "train_step has met more shapes of batches than torch.compile keeps graphs for "
    "(torch._dynamo.config.recompile_limit), or numbers that change: give batches few shapes, by "
    "padding or drop_last, raise that limit, or pass make_train_step(..., compile=False); numbers "
    "that change, in the batch or in what loss_fn closes over, are to be passed as tensors, and "
    "those of the model (the p of a dropout, say) to be held in buffers, or to change seldom"
)


Compiler: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]
"""From a pure step to what runs in its place."""


def compiler_of(compile: bool | Mapping[str, Any], *, required: bool = False) -> Compiler:
    """Return what compiles pure steps.

    A fault of the caller's own (a loss that is no scalar, a batch the model refuses) raises
    as it does in eager mode. Where the machine cannot compile, the step runs eager after one
    warning.

    Args:
        compile: False for the step as it is, True for one graph, or options of
            `torch.compile`, taken over ``fullgraph=True, dynamic=False``.
        required: Whether to raise where the machine cannot compile: other processes run the
            compiled step, and an eager one rounds otherwise.

    Returns:
        The compiler. A step of it raises RuntimeError, naming the reason and the way on, where the
        model or loss breaks the graph or otherwise runs in eager mode alone.

    Raises:
        TypeError: ``compile`` is neither a bool nor a mapping.
        RuntimeError: The step must be compiled, and torch is too old.
    """
    if compile is False:
        return _as_it_is
    if TorchVersion(torch.__version__) < TorchVersion(COMPILES_FROM):
        reason = f"torch {torch.__version__} is too old, {COMPILES_FROM} is needed"
        _run_eager(reason, required)
        return _as_it_is
    if compile is not True and not isinstance(compile, Mapping):
        raise TypeError(f"compile must be a bool or options of torch.compile, got {compile!r}")
    options = {**ONE_GRAPH, **({} if compile is True else compile)}
    if not {"backend", "mode", "options"} & options.keys():
        options["options"] = _inductor_options()
    torch.compile(_as_it_is, **options)  # raises where the options are none
    return partial(_compiled, options, required)


def _inductor_options() -> dict[str, Any]:
    """Return options with which a step draws random numbers as in eager mode, and stays in tiles.

    They are not those of a backend or mode of one's own.
    """
    from topkast_func.kernels.between import StayInTiles  # loads Inductor, which takes a while

    return {"fallback_random": True, "post_grad_custom_post_pass": StayInTiles()}


def _as_it_is(step: Callable[..., Any]) -> Callable[..., Any]:
    return step


def _compiled(
    options: Mapping[str, Any], required: bool, step: Callable[..., Any]
) -> Callable[..., Any]:
    from torch._dynamo import callback, config, exc  # loads Dynamo, which takes a second

    if config.disable:
        _run_eager("torch.compile is switched off (TORCH_COMPILE_DISABLE)", required)
        return step
    fast: Callable[..., Any] = torch.compile(_fresh(step), **options)
    if options.get("backend", "inductor") == "inductor":
        _find_vectors()

    def call(*arguments: Any) -> Any:
        nonlocal fast
        try:
            with _watched(callback.callback_handler):
                return fast(*arguments)
        except exc.FailOnRecompileLimitHit as failure:
            raise RuntimeError(SHAPES) from failure
        except exc.BackendCompilerFailed as failure:
            _run_eager(f"torch.compile failed ({_cause(failure)})", required)
            fast = step
            return step(*arguments)
        except torch.OutOfMemoryError:
            raise
        except (exc.TorchDynamoException, RuntimeError) as failure:
            failed = failure
        step(*tree_map_only(Tensor, torch.clone, arguments))  # raises what is a fault of its own
        kinds = exc.Unsupported, exc.UserError  # of what a graph cannot hold
        breaks = isinstance(failed, kinds) and options["fullgraph"]
        raise RuntimeError((BROKEN if breaks else EAGER_ALONE).format(failed)) from failed

    return call


@cache
def _find_vectors() -> threading.Thread:
    """Begin to find out which vectors the C++ compiler has, which takes Inductor a second.

    It passes while the step is traced, in programs that a thread waits for, once in a process.

    Returns:
        The thread.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    def find() -> None:
        with suppress(Exception):  # Inductor will meet it where it matters
            pick_vec_isa()

    thread = threading.Thread(target=find, daemon=True)
    thread.start()
    return thread


@contextmanager
def _watched(handler: Any) -> Iterator[None]:
    """Let Dynamo report when it begins and ends to compile."""
    starts, ends = handler.start_callbacks, handler.end_callbacks
    starts.append(compiling.begin)
    ends.append(compiling.end)
    try:
        yield
    finally:
        starts.remove(compiling.begin)
        ends.remove(compiling.end)


def signature(arguments: Any) -> Hashable:
    """Return what decides whether a graph that was traced for other arguments serves these.

    Args:
        arguments: A tree of tensors and numbers.

    Returns:
        Its structure, the kinds of its tensors, its numbers and texts, and whether autocast is on.

    Raises:
        TypeError: A tensor is of a subclass that torch.compile does not take.
    """
    leaves, structure = tree_flatten(arguments)
    kinds = tuple(map(_kind, leaves))
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
    casts = tuple((d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d))
    known = structure if isinstance(structure, Hashable) else repr(structure)  # as in torch 2.6
    return known, kinds, casts


def _kind(leaf: Any) -> object:
    if isinstance(leaf, Tensor):
        if not dispatches(leaf) and type(leaf) not in (Tensor, nn.Parameter, nn.Buffer):
            raise TypeError(
                f"the batch holds a {type(leaf).__name__}, which a compiled step does not take: "
                "give it as plain tensor (tensor.as_subclass(torch.Tensor)), or pass "
                "make_train_step(..., compile=False)"
            )
        strides = leaf.stride() if leaf.layout == torch.strided else None
        return leaf.shape, strides, leaf.dtype, leaf.device, leaf.requires_grad
    return leaf if isinstance(leaf, (bool, int, float, str, bytes)) else type(leaf)


def _run_eager(reason: str, required: bool) -> None:
    """Warn that a step runs eager, or raise where it must not."""
    if required:
        raise RuntimeError(ALONE.format(reason))
    warn_caller(EAGER.format(reason))


def _fresh(step: Any) -> FunctionType:
    """Copy a function with code of its own: Dynamo counts recompiles per code object."""
    return FunctionType(
        step.__code__.replace(),
        step.__globals__,
        step.__name__,
        step.__defaults__,
        step.__closure__,
    )


def _cause(failure: Any) -> str:
    """Name the exception behind a failure and the first line of its text, if it has any."""
    cause = failure.inner_exception
    if "TensorWrapper" in str(cause):
        return KEPT
    return ": ".join([type(cause).__name__, *str(cause).strip().splitlines()[:1]])
