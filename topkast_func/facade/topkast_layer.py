"""The base of the seed's layer and its siblings: a sparse weight, and the seed's names."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from topkast_func.checks import check_number, check_order
from topkast_func.config import TopKastConfig
from topkast_func.facade.derived import check_whole
from topkast_func.facade.rule import Rule
from topkast_func.facade.sparse_layer import (
    SparseLayer,
    make_sparse,
    sparse_attribute,
)
from topkast_func.facade.sparse_linear import SparseLinear
from topkast_func.facade.sparse_weight import weights_of
from topkast_func.kernels.engines import EngineName
from topkast_func.ranking import kept, magnitudes, top_sets
from topkast_func.sparsity import Allocation
from topkast_func.trees import check_params
from topkast_func.types import Masks

Index = tuple[Tensor, ...]


class Theta(nn.Parameter):
    """A parameter that may be written to where gradients are recorded, as the seed's weight."""

    __iadd__ = torch.no_grad()(Tensor.__iadd__)
    __isub__ = torch.no_grad()(Tensor.__isub__)
    __imul__ = torch.no_grad()(Tensor.__imul__)
    __itruediv__ = torch.no_grad()(Tensor.__itruediv__)
    __setitem__ = torch.no_grad()(Tensor.__setitem__)


class TopKastLayer(SparseLayer):
    """A layer with a sparse ``weight``, and the seed's names for what belongs to it.

    The weight is an ordinary parameter, θ: with its gradient and its optimiser slots it takes
    the memory of a dense layer. The forward pass computes with α = θ·1_A, the gradient is that
    at α, kept on B, and no optimiser of `torch.optim` moves what lies outside B.

    Attributes:
        weight: θ. A tensor that is assigned to it, flat if you like, is copied into θ; a
            parameter takes its place.
        weight_sets: Buffer, uint8, [2, ⌈n/8⌉]: the masks of A and B over the n entries in bits,
            ``numpy.packbits(masks, axis=1, bitorder="little")``. A state dict without it, of a
            dense layer, loads too: the sets are then chosen from its weight.
        p_forward: Forward sparsity, 1 − D, as the next refresh is to have it.
        p_backward: Backward sparsity, 1 − (D + M).
    """

    weight = sparse_attribute("weight")
    weight_sets: Tensor

    @torch.inference_mode(False)
    def _start(self, p_forward: float, p_backward: float, engine: EngineName = "auto") -> None:
        self.p_forward, self.p_backward, self.engine = p_forward, p_backward, engine
        self._parameters["weight"].__class__ = Theta
        make_sparse(self, "weight", self._rule())
        self.register_forward_pre_hook(_keep_off_fused_paths)

    def _rule(self) -> Rule:
        shape = tuple(self._parameters["weight"].shape)  # type: ignore[union-attr]
        size = math.prod(shape)
        allocation = check_sparsities(self.p_forward, self.p_backward)
        config = TopKastConfig(*allocation, sparse="weight")
        counts = frozenset({(kept(allocation.forward, size), kept(allocation.backward, size))})
        matrix = isinstance(self, SparseLinear)
        return Rule("weight", shape, config, allocation, counts, matrix=matrix, engine=self.engine)

    def forward(self, inputs: Tensor, sparse: bool = True) -> Any:
        """Apply the layer.

        Args:
            inputs: What the plain layer takes.
            sparse: Compute with α, the network that is trained. False computes with all of θ,
                for prediction only: parameters then get no gradient.

        Returns:
            What the plain layer returns.
        """
        return super().forward(inputs) if sparse else _plain_twin(self)(inputs)

    def reset_parameters(self) -> None:
        """Draw θ and the bias as the plain layer does; choose A and B."""
        self._plain.reset_parameters(self)
        if weights_of(self):
            self.update_active_param_set()

    def update_active_param_set(self) -> None:
        """Choose A and B anew from θ.

        In every optimiser a slot (momentum, Adam) stays with its weight, and a weight that newly
        enters B starts with the slots of a parameter that is new: zero in most optimisers.

        Raises:
            NaNParameterError: θ holds NaN; nothing has changed.
        """
        weight = weights_of(self)["weight"]
        weight.rule = self._rule()._replace(shape=weight.rule.shape)
        weight.choose(self)

    def reset_justbwd_weights(self) -> None:
        """Do nothing: the parameter is up to date. For loops that were written for the seed."""

    def _make_plain(self, done: set[int]) -> None:
        """Become a layer of the plain class, whose weight is α."""
        hooks = self._forward_pre_hooks
        for number in [n for n, hook in hooks.items() if hook is _keep_off_fused_paths]:
            del hooks[number]
        for name in ("p_forward", "p_backward", "engine"):
            delattr(self, name)
        if (theta := self._parameters["weight"]) is not None:
            theta.__class__ = nn.Parameter
        super()._make_plain(done)

    @staticmethod
    def compute_mask(matrix: Tensor, p: float) -> Index:
        """Find the entries of largest magnitude.

        Args:
            matrix: Weights, floating point.
            p: Sparsity, fraction in [0, 1).

        Returns:
            Indices of the max(1, floor((1 − p)·n + 1/2)) largest of the n entries, as
            `torch.where` gives them; ties go in the order of `tie_key`.

        Raises:
            TypeError: The matrix or ``p`` has the wrong type.
            ValueError: The matrix is empty or holds NaN, or ``p`` is out of range.
        """
        sparsity = check_number("p", p, 0.0, 1.0)
        check_params({"matrix": matrix})
        scores = magnitudes("matrix", matrix.detach(), (1, 1), "l2")
        count = kept(sparsity, scores.numel())
        return torch.where(top_sets("matrix", scores, count, count)[0])

    @property
    def masks(self) -> Masks:
        """A and B, bool, of the shape of the weight."""
        return weights_of(self)["weight"].masks(self)

    @property
    def idx_fwd(self) -> Index:
        """A as `torch.where` gives it: int64 indices of each axis, in row-major order."""
        return torch.where(self.masks.forward)

    @property
    def idx_bwd(self) -> Index:
        """B as `torch.where` gives it."""
        return torch.where(self.masks.backward)

    @property
    def idx_justbwd(self) -> Index:
        """B∖A as `torch.where` gives it."""
        forward, backward = self.masks
        return torch.where(backward & ~forward)

    @property
    def set_fwd(self) -> range:
        """Which of ``active_fwd_weights`` are those of A."""
        return range(len(self.idx_fwd[0]))

    @property
    def set_justbwd(self) -> range:
        """Which of ``active_fwd_weights`` are those of B∖A."""
        return range(len(self.idx_fwd[0]), len(self.idx_bwd[0]))

    @property
    def active_fwd_weights(self) -> Tensor:
        """θ on A, then on B∖A, [|B|], beside the gradient of θ there."""
        theta, indices = self.weight, (self.idx_fwd, self.idx_justbwd)
        values = torch.cat([theta[index] for index in indices])
        if theta.grad is not None:
            values.grad = torch.cat([theta.grad[index] for index in indices])
        return values

    def extra_repr(self) -> str:
        """Describe the layer for ``print``."""
        sparsities = f"p_forward={self.p_forward}, p_backward={self.p_backward}"
        return f"{self._plain.extra_repr(self)}, {sparsities}, engine={self.engine!r}"

    def __setattr__(self, name: str, value: Any) -> None:
        """Copy a tensor that is assigned to the weight."""
        theta = self.__dict__.get("_parameters", {}).get("weight")
        if name != "weight" or theta is None or not isinstance(value, Tensor):
            super().__setattr__(name, value)
            return
        check_whole(value, name)
        if tuple(value.shape) not in (tuple(theta.shape), (theta.numel(),)):
            raise ValueError(
                f"weight must have shape {tuple(theta.shape)}, got {tuple(value.shape)}"
            )
        if isinstance(value, nn.Parameter) and value.shape == theta.shape:
            super().__setattr__(name, value)
            return
        with torch.no_grad():
            theta.copy_(value.reshape(theta.shape))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the layer from a pickle, which makes a plain parameter of θ."""
        super().__setstate__(state)
        self._parameters["weight"].__class__ = Theta


def check_sparsities(p_forward: object, p_backward: object) -> Allocation:
    """Return the sparsities of a layer if they are such.

    Args:
        p_forward: Forward sparsity, fraction in [0, 1).
        p_backward: Backward sparsity, fraction in [0, p_forward].

    Returns:
        The two.

    Raises:
        TypeError: One is no number.
        ValueError: One is out of range.
    """
    forward = check_number("p_forward", p_forward, 0.0, 1.0)
    backward = check_number("p_backward", p_backward, 0.0, 1.0)
    check_order(forward, backward, "p_backward", "p_forward")
    return Allocation(forward, backward)


def _keep_off_fused_paths(*_: object) -> None:
    """Do nothing, as a hook: fused transformer layers, which read θ, give way to any hook."""


def _plain_twin(layer: SparseLayer) -> nn.Module:
    """Return a layer of the plain class that computes with all of θ, without a gradient for it."""
    twin: nn.Module = layer._plain.__new__(layer._plain)
    detached = {n: None if p is None else p.detach() for n, p in layer._parameters.items()}
    vars(twin).update(vars(layer), _parameters=detached)
    return twin
