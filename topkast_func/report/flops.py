"""Theoretical floating-point operations of training, beside those of the dense model."""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.random import fork_rng
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from topkast_func.checks import check_callable
from topkast_func.model.alone import alone_with, as_plain
from topkast_func.training.ensembles import is_mapped
from topkast_func.training.fits_model import check_tensors
from topkast_func.training.readout import forward_params, masks_of
from topkast_func.training.state import TrainState, check_one
from topkast_func.turns import EVERYTHING
from topkast_func.types import Model


class TrainingFlops(NamedTuple):
    """Operations of one training step: products alone, a multiplication and an addition each.

    Attributes:
        sparse: 2 f(D) + f(D+M): forward pass and input gradient with A, weight gradient with B.
        dense: 3 f(1).

    Of a frozen weight the gradient is left out of both.
    """

    sparse: float
    dense: float

    @property
    def ratio(self) -> float:
        """Sparse over dense; NaN where the model has no products."""
        return self.sparse / self.dense if self.dense else math.nan


def training_flops(model: Model, state: TrainState, *inputs: Any, **options: Any) -> TrainingFlops:
    """Count the operations of a training step, from one forward pass.

    The backward pass counts as two products for every one of the forward pass, as one where the
    weight is frozen; products without a sparse weight (attention scores) are dense, and so is the
    product with a weight that the model computes from others (`weight_norm`). The count follows
    from the densities alone: it is no measure of time. Matrix products, convolutions and
    attention count, `nn.Bilinear` does not. Nothing is written to, and the caller's random
    numbers stay as they are.

    Args:
        model: A module, or a pure function ``apply(params, *inputs)``.
        state: The state.
        *inputs: Inputs of the model, one batch.
        **options: Its keyword inputs.

    Returns:
        The operations.

    Raises:
        TypeError: The model cannot be called, or ``state`` is no state.
        ValueError: The state is of another model, or other ranks own a part of it.
        RuntimeError: It is differentiated.

    Example:
        >>> from topkast_func import TopKastConfig, init_state, sgd
        >>> model = torch.nn.Linear(100, 10)
        >>> state = init_state(model, TopKastConfig(), sgd(lr=0.1))
        >>> training_flops(model, state, torch.zeros(8, 100))
        TrainingFlops(sparse=6400.0, dense=48000.0)
    """
    check_callable("model", model)
    is_mapped("training_flops", (inputs, options))
    model = as_plain(model)
    check_one(state)
    tensors = forward_params(state)
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
    devices = {t.device.index for t in tensors.values() if t.device.type == "cuda"}
    counted = _Products(owners)

    def run() -> None:
        with torch.no_grad(), fork_rng(list(devices)), _no_fused_layers(), counted:
            if isinstance(model, torch.nn.Module):
                check_tensors(state, model)
                functional_call(model, tensors, inputs, options)
            else:
                model(tensors, *inputs, **options)

    alone_with(model, run, EVERYTHING)
    share = {
        name: 2 * float(masks.forward.double().mean()) + float(masks.backward.double().mean())
        for name, masks in masks_of(state).items()
    }
    full = {name: 2.0 if name in state.frozen else 3.0 for name in counted.flops}
    sparse = sum((full | share)[name] * count for name, count in counted.flops.items())
    dense = sum(full[name] * count for name, count in counted.flops.items())
    return TrainingFlops(round(sparse, 6), dense)


@contextmanager
def _no_fused_layers() -> Iterator[None]:
    """Let recurrent and attention layers run product by product."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")  # mkldnn's flags warn of what they do not touch
            for backend in (torch.backends.mkldnn, torch.backends.cudnn):
                stack.enter_context(backend.flags(enabled=False))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


_ATEN = torch.ops.aten
COPIES = (_ATEN.clone, _ATEN._to_copy)
"""What makes the weight that a product reads, where it is rearranged or cast before."""


@cache
def _counts() -> dict[Any, Any]:
    """Return what counts the operations of each kind of product, from its operands."""
    from torch.utils.flop_counter import flop_registry  # loads Triton: a fifth of a second

    return {
        **flop_registry,
        _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
            _ATEN._scaled_dot_product_flash_attention
        ],
        _ATEN.mv: lambda matrix, vector, **_: 2 * matrix.numel(),
        _ATEN.addmv: lambda offset, matrix, vector, **_: 2 * matrix.numel(),
    }


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of products by the weight among their operands."""

    def __init__(self, owners: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owners = dict(owners)
        self.copies: list[Tensor] = []
        self.flops: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in _counts() and func is not torch.ops.prim.device.default:
            with self:
                decomposed = func.decompose(*args, **kwargs)
                if decomposed is not NotImplemented:
                    return decomposed
        out = func(*args, **kwargs)
        if packet in COPIES and (owner := self._owner(args)):
            self.owners[out.untyped_storage().data_ptr()] = owner
            self.copies.append(out)  # kept, so that its memory is not used again
        if packet in _counts():
            count = _counts()[packet](*args, **kwargs, out_val=out)
            self.flops[self._owner(args)] += count
        return out

    def _owner(self, args: Any) -> str:
        """Return the name of the parameter that a product multiplies with, or ""."""
        operands = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        storages = [leaf.untyped_storage().data_ptr() for leaf in operands if leaf.ndim > 1]
        return next((self.owners[s] for s in storages if s in self.owners), "")
