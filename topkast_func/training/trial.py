"""The forward pass on trial: that it is pure, and that the loss depends on what is trained."""

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointFunction

from topkast_func.compiling import graphs_begun
from topkast_func.model.alone import parts_of
from topkast_func.model.modules import CHANGED, bind, tensors_of, ties, unset_buffers
from topkast_func.model.overlaps import check_overlaps
from topkast_func.reading import versions
from topkast_func.training.derivative import HOOKS, without_hooks
from topkast_func.training.loss import loss_and_aux
from topkast_func.training.random_numbers import random_numbers_of
from topkast_func.training.readout import alpha_in
from topkast_func.training.repeats import Repeats, Result
from topkast_func.training.state import TrainState
from topkast_func.turns import RANDOM_NUMBERS, require
from topkast_func.types import LossFn, Model, Tensors
from topkast_func.warn import warn_caller

UNSEEN = (
    "the loss does not depend on what is trained: call the model through apply: model(x) has the "
    "original weights; and detach nothing, nor compute under torch.no_grad(), on the way to it"
)
ORIGINAL = (
    "the loss depends on {} as the module has them, which are never trained: read them in the "
    "forward pass that apply runs, or take the penalty of the configuration or the weight decay of "
    "the optimizer; where the original weights are meant, compute with them under torch.no_grad()"
)
STRANGE = (
    "the loss depends on parameters that are none of the model, of shapes {}, and are not trained: "
    "make them part of the model, or compute what they are in under torch.no_grad()"
)
BACKWARD = "loss_fn calls backward(): it is to return the loss, and the step differentiates that"
WRITTEN = (
    "the step has written to the state that it was given, which is not whole any more: what the "
    "optimizer, the forward pass or loss_fn is given is to be copied before it is changed in place"
)
INPUTS = "the forward pass or loss_fn changes its inputs in place: copy them first"


class Trials:
    """Tries the forward pass in each mode of the model, and again where it may have changed.

    Args:
        model: A module, or a pure function ``apply(params, *inputs)``.
        loss_fn: ``loss_fn(apply, batch)``.
    """

    def __init__(self, model: Model, loss_fn: LossFn) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._tried: set[Hashable] = set()
        self._repeats = Repeats(model)

    @contextmanager
    def around(
        self, mode: Hashable, state: TrainState, batch: Any
    ) -> Iterator[tuple[Any, ...] | None]:
        """Try the forward pass before a step of a new mode, after one that fails or is traced anew.

        Args:
            mode: Mode of the model.
            state: The state of the step.
            batch: Its batch.

        Yields:
            What came with the loss, if anything, in a new mode; None in others, and where the
            trial has failed. The step is to be made.

        Raises:
            ValueError: See `check_pure`; or the step has written to the batch.
            RuntimeError: See `check_pure`; or the model reads weights that torch has cached.
        """
        _check_uncached(self._model)
        new = mode not in self._tried
        result = self._try(mode, state, batch) if new else None
        traced = graphs_begun()
        given = {str(i): leaf for i, leaf in enumerate(_tensors(batch))}
        held = {str(i): leaf for i, leaf in enumerate(_tensors(state) if new else ())}
        before, whole = versions(given), versions(held)
        try:
            yield result and result[1]
        except Exception:
            if not new:
                self._try(mode, state, batch)
            raise
        if versions(given) != before:
            raise ValueError(INPUTS)
        if versions(held) != whole:
            raise ValueError(WRITTEN)
        if graphs_begun() != traced and not new:
            self._try(mode, state, batch)

    def _try(self, mode: Hashable, state: TrainState, batch: Any) -> Result:
        new = mode not in self._tried
        self._tried.discard(mode)  # for a turn that begins again
        require(RANDOM_NUMBERS)
        trial = partial(check_pure, self._model, self._loss_fn, state, batch)
        result = self._repeats.run(trial, twice=new)
        self._tried.add(mode)
        return result


def _check_uncached(model: Model) -> None:
    """Check that parametrized weights are computed from the parameters of the step."""
    if parametrize._cache_enabled and any(map(parametrize.is_parametrized, parts_of(model))):
        raise RuntimeError(
            "within torch.nn.utils.parametrize.cached() a step would compute with parametrized "
            "weights of another: call it outside; the loss function may use cached() within"
        )


@torch.enable_grad()
def check_pure(model: Model, loss_fn: LossFn, state: TrainState, batch: Any) -> Result:
    """Try the forward pass on copies: a compiled step would write changes into the state.

    Args:
        model: A module, or a pure function ``apply(params, *inputs)``.
        loss_fn: ``loss_fn(apply, batch)``.
        state: The state; it is not written to.
        batch: Whatever ``loss_fn`` takes; nor is it.

    Returns:
        The loss, and what came with it; None where it ended in an error that the step will tell.

    Raises:
        ValueError: It changes a parameter or its inputs, gives a buffer another shape, or sets
            one that was None; the loss does not depend on what is trained, or on the parameters
            that the module itself has, or has a gradient that is a sparse tensor, or has been
            differentiated already.
        RuntimeError: It uses `torch.utils.checkpoint`. What else is wrong with it is for the step
            to say.
    """
    if any(tensor.is_meta for tensor in _tensors(batch)):
        raise ValueError("the batch holds tensors on the meta device, without values")
    given, batch = _tensors(batch), tree_map_only(Tensor, torch.clone, batch)
    inputs = _tensors(batch)
    before, unset = alpha_in(state), unset_buffers(model)
    trained = {name: before[name].detach().requires_grad_() for name in state.weights.shapes()}
    weights = {name: tensor.clone() for name, tensor in {**before, **trained}.items()}
    held, loss, aux = dict(weights), None, ()
    with random_numbers_of(state), _only_of_hooks():
        loss, aux = loss_and_aux(loss_fn(bind(model, ties(model), weights, {}, held), batch))
    written = {name: held.pop(name) for name in state.buffers}
    if changed := [
        name
        for name, now in held.items()
        if now is not weights[name] or now._version or not _same(now, before[name])
    ]:
        raise ValueError(CHANGED.format(changed))
    if any(now._version or not _same(now, leaf) for now, leaf in zip(inputs, given, strict=True)):
        raise ValueError(INPUTS)
    moved = [n for n, now in written.items() if now is not weights[n] or now._version]
    check_overlaps(model, (*trained, *moved))
    if reshaped := [n for n, b in written.items() if b.shape != before[n].shape]:
        raise ValueError(f"the forward pass gives buffers {reshaped} another shape")
    found = unset_buffers(model)
    if newly_set := [name for name in unset if name not in found]:
        for module, key in (unset[name] for name in newly_set):
            module._buffers[key] = None
        raise ValueError(
            f"the forward pass sets buffers {newly_set} that were None: register them as tensors"
        )
    if any(leaf.grad is not None for leaf in trained.values()):
        raise ValueError(BACKWARD)
    if loss is None:
        return None
    _check_graph(loss, trained, tensors_of(model))
    return loss.detach(), tree_map_only(Tensor, Tensor.detach, aux)


def _same(now: Tensor, before: Tensor) -> bool:
    """Return whether tensors are equal, NaN to NaN; True of kinds that torch cannot compare."""
    if now.is_nested or now.layout != torch.strided or now.shape != before.shape:
        return now.is_nested or now.shape == before.shape
    return torch.allclose(now, before, rtol=0.0, atol=0.0, equal_nan=True)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _only_of_hooks() -> Iterator[None]:
    """Raise an error of what the step does not differentiate through, and no other."""
    try:
        with without_hooks(), _NoCheckpoint():
            yield
    except Exception as reason:
        if str(reason) == HOOKS:
            raise RuntimeError(HOOKS) from None


class _NoCheckpoint(TorchFunctionMode):
    """Refuses what is computed within a reentrant checkpoint, which has no hooks."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        frame = None if torch.is_grad_enabled() else inspect.currentframe()
        while frame:
            if frame.f_code is CheckpointFunction.forward.__code__:
                raise RuntimeError(HOOKS)
            frame = frame.f_back
        return func(*args, **(kwargs or {}))


def _check_graph(loss: Tensor, trained: Tensors, own: Tensors) -> None:
    """Check which leaves are in the graph of a loss, and that all gradients are strided."""
    ends = {get_gradient_edge(leaf).node: name for name, leaf in trained.items()}
    graph = _behind(loss.grad_fn)
    if not ends.keys() & graph:
        raise ValueError(UNSEEN)
    originals = {id(parameter): name for name, parameter in own.items()}
    leaves = [node.variable for node in graph if hasattr(node, "variable")]
    if names := sorted(originals[id(leaf)] for leaf in leaves if id(leaf) in originals):
        raise ValueError(ORIGINAL.format(names))
    if shapes := [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, nn.Parameter)]:
        warn_caller(STRANGE.format(shapes))
    sparse = {node for node in graph if getattr(node, "_saved_sparse", False)}
    if names := [ends[end] for node in sparse for end in ends.keys() & _behind(node)]:
        raise ValueError(
            f"the gradients of {names} are sparse tensors, which the step does not take: make "
            "their embeddings with sparse=False"
        )


def _behind(last: Node | None) -> set[Node]:
    """Return a node of a graph and all that it depends on."""
    met: set[Any] = set()
    ahead: set[Any] = {last}
    while ahead := ahead - met - {None}:
        met |= ahead
        ahead = {node for behind in ahead for node, _ in behind.next_functions}
    return met
