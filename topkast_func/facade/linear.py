"""A linear layer that trains the values of B and computes with those of A."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from topkast_func.allocation import Allocation, check_params
from topkast_func.config import check_count, check_number, check_order
from topkast_func.masks import kept, magnitudes, top_sets

Index = tuple[Tensor, ...]


_OPTIMIZERS: "WeakSet[Optimizer]" = WeakSet()
"""Optimisers that have made a step: only these can hold slots."""


@cache
def _meet_optimizers() -> None:
    """From the first layer on, note every optimiser that steps."""
    register_optimizer_step_pre_hook(lambda optimizer, *_: _OPTIMIZERS.add(optimizer))


class TopKastLinear(nn.Module):
    """A sparse stand-in for `torch.nn.Linear`: y = x αᵀ + b with α = θ·1_A.

    The parameter ``active_fwd_weights`` holds θ on B and never changes its identity or
    shape, so that an optimiser built from ``net.parameters()`` stays valid through every
    refresh. θ outside B rests in the buffer ``theta``.

    Args:
        in_features: Size of an input, at least 1.
        out_features: Size of an output, at least 1.
        p_forward: Forward sparsity 1 − D, fraction in [0, 1).
        p_backward: Backward sparsity 1 − (D + M), fraction in [0, p_forward].
        bias: Whether to add a trained bias.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Attributes:
        active_fwd_weights: Parameter, [|B|]: θ on A, then on B∖A, each in row-major order.
        bias: Parameter, [out_features], or None.
        theta: Buffer, [out_features, in_features]; read ``weight`` instead.
        positions_fwd: Buffer, int64, [|A|]: where in the flat θ the values of A belong.
        positions_justbwd: Buffer, int64, [|B∖A|]: the same for B∖A.

    Raises:
        TypeError: A size or sparsity is no number.
        ValueError: A size or sparsity is out of range.

    Departures:
        The values of B∖A stay in ``active_fwd_weights`` beside those of A, where the seed
        holds zeros; the forward pass does not see them. Inputs may have any number of
        leading dimensions, and get a gradient in evaluation mode too.

    Example:
        >>> layer = TopKastLinear(10, 16, p_forward=0.6, p_backward=0.4)
        >>> layer(torch.zeros(3, 10)).shape, len(layer.set_fwd), len(layer.set_justbwd)
        (torch.Size([3, 16]), 64, 32)
    """

    theta: Tensor
    positions_fwd: Tensor
    positions_justbwd: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        p_forward: float,
        p_backward: float,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_count("in_features", in_features, 1)
        self.out_features = check_count("out_features", out_features, 1)
        self.p_forward = check_number("p_forward", p_forward, 0.0, 1.0)
        self.p_backward = check_number("p_backward", p_backward, 0.0, 1.0)
        check_order(self.p_forward, self.p_backward, "p_backward", "p_forward")
        size = self.out_features * self.in_features
        forward, backward = kept(self.p_forward, size), kept(self.p_backward, size)
        self.set_fwd, self.set_justbwd = range(forward), range(forward, backward)
        theta = torch.empty(self.out_features, self.in_features, device=device, dtype=dtype)
        self.register_buffer("theta", theta)
        self.register_buffer("positions_fwd", torch.arange(forward, device=device))
        self.register_buffer("positions_justbwd", torch.arange(forward, backward, device=device))
        self.active_fwd_weights = nn.Parameter(theta.new_empty(backward))
        offset = nn.Parameter(theta.new_empty(self.out_features)) if bias else None
        self.register_parameter("bias", offset)
        self._lent: Tensor | None = None
        _meet_optimizers()
        self.reset_parameters()

    @property
    def weight(self) -> Tensor:
        """θ, [out_features, in_features], up to date on B.

        Write to it in place or assign to it (flat, if you like): the values on B follow, and
        keep the training steps made since it was read.
        """
        self._merge()
        self._lent = self.active_fwd_weights.detach().clone()
        return self.theta

    @weight.setter
    def weight(self, value: Tensor) -> None:
        shape = tuple(self.theta.shape)
        if tuple(value.shape) not in (shape, (self.theta.numel(),)):
            raise ValueError(f"weight must have shape {shape}, got {tuple(value.shape)}")
        with torch.no_grad():
            self.theta.copy_(value.reshape(shape))
        self._split()

    @property
    def positions(self) -> Tensor:
        """Where in the flat θ each of ``active_fwd_weights`` belongs, int64, [|B|]."""
        return torch.cat((self.positions_fwd, self.positions_justbwd))

    @property
    def idx_fwd(self) -> Index:
        """A as `torch.where` gives it: row and column indices, int64, in row-major order."""
        return self._unravel(self.positions_fwd)

    @property
    def idx_bwd(self) -> Index:
        """B as `torch.where` gives it."""
        return self._unravel(self.positions.sort().values)

    @property
    def idx_justbwd(self) -> Index:
        """B∖A as `torch.where` gives it."""
        return self._unravel(self.positions_justbwd)

    @staticmethod
    def compute_mask(matrix: Tensor, p: float) -> Index:
        """Find the entries of largest magnitude.

        Args:
            matrix: Weights, floating point.
            p: Sparsity, fraction in [0, 1).

        Returns:
            Indices of the max(1, floor((1 − p)·n + 1/2)) largest of the n entries, as
            `torch.where` gives them; ties go to the lowest flat index.

        Raises:
            TypeError: The matrix or ``p`` has the wrong type.
            ValueError: The matrix is empty or holds NaN, or ``p`` is out of range.
        """
        sparsity = check_number("p", p, 0.0, 1.0)
        check_params({"matrix": matrix})
        scores = magnitudes("matrix", matrix.detach(), (1, 1), "l2")
        return torch.where(top_sets("matrix", scores, Allocation(sparsity, sparsity))[0])

    def reset_parameters(self) -> None:
        """Draw θ (Kaiming uniform, as `torch.nn.Linear`) and the bias; choose A and B."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.kaiming_uniform_(self.theta, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self._split()
        self.update_active_param_set()

    def update_active_param_set(self, optimizer: Optimizer | None = None) -> None:
        """Choose A and B anew from θ.

        In every optimiser that trains this layer a slot (momentum, Adam) stays with its
        weight, and a weight that newly enters B starts with zero slots.

        Args:
            optimizer: The optimiser, if it has slots but has made no step in this process.

        Raises:
            ValueError: θ holds NaN; nothing has changed.
        """
        self._merge()
        scores = magnitudes("weight", self.theta, (1, 1), "l2")
        forward, backward = top_sets("weight", scores, Allocation(self.p_forward, self.p_backward))
        sets = (forward, backward & ~forward)
        self.arrange(torch.cat([mask.flatten().nonzero().squeeze(1) for mask in sets]), optimizer)

    def arrange(self, positions: Tensor, optimizer: Optimizer | None = None) -> None:
        """Let the parameter hold θ at ``positions``; gradient and slots move along.

        L-BFGS, whose history is one vector over all parameters, starts its history anew.

        Args:
            positions: Flat indices into θ, int64, [|B|], those of A first.
            optimizer: The optimiser, if it has slots but has made no step in this process.
        """
        self._merge()
        parameter, old = self.active_fwd_weights, self.positions
        optimizers = {*_OPTIMIZERS, *([optimizer] if optimizer else [])}
        slots = [s for o in optimizers for s in o.state.get(parameter, {}).values()]
        for slot in (parameter.grad, *slots):
            if isinstance(slot, Tensor) and slot.shape == parameter.shape:
                spread = slot.new_zeros(self.theta.numel())
                spread[old] = slot
                slot.copy_(spread[positions])
        for lbfgs in (o for o in optimizers if isinstance(o, LBFGS)):
            trained = (p for group in lbfgs.param_groups for p in group["params"])
            if any(p is parameter for p in trained) and not torch.equal(old, positions):
                lbfgs.state.clear()
        self.positions_fwd.copy_(positions[: len(self.set_fwd)])
        self.positions_justbwd.copy_(positions[len(self.set_fwd) :])
        self._split()

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return θ on A and θ on B∖A, as the parameter holds them, up to date."""
        if self._lent is not None and not torch.compiler.is_compiling():
            self._merge()
        active, exploring = self.active_fwd_weights.tensor_split([len(self.set_fwd)])
        return active, exploring

    def reset_justbwd_weights(self) -> None:
        """Write the values of B back into θ, as reading ``weight`` does.

        Kept for loops written for the seed. No update is lost without it.
        """
        self._merge()

    def forward(self, inputs: Tensor, sparse: bool = True) -> Tensor:
        """Apply the layer.

        Args:
            inputs: [..., in_features].
            sparse: Compute with α, the network that is trained. False computes with all of θ,
                for prediction only: parameters then get no gradient.

        Returns:
            [..., out_features].
        """
        if not sparse:
            bias = None if self.bias is None else self.bias.detach()
            self._merge()
            return functional.linear(inputs, self.theta.clone(), bias)
        return functional.linear(inputs, self._alpha(), self.bias)

    def extra_repr(self) -> str:
        """Describe the layer for ``print``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"p_forward={self.p_forward}, p_backward={self.p_backward}, "
            f"bias={self.bias is not None}"
        )

    def _alpha(self) -> Tensor:
        """Return α with the gradient of the identity on B."""
        active, exploring = self.parts()
        values = torch.cat((active, exploring - exploring.detach()))
        return (
            values
            .new_zeros(self.theta.numel())
            .scatter(0, self.positions, values)
            .view(self.theta.shape)
        )

    def _unravel(self, flat: Tensor) -> Index:
        return flat // self.in_features, flat % self.in_features

    @torch.no_grad()
    def _merge(self) -> None:
        """Write the values of B into θ; what was written to a lent θ changes the values first."""
        values, flat, positions = self.active_fwd_weights, self.theta.view(-1), self.positions
        if self._lent is not None and not torch.equal(written := flat[positions], self._lent):
            moved = written + (values - self._lent)
            values.copy_(torch.where(written != self._lent, moved, values))
        if self._lent is not None:
            self._lent = values.detach().clone()
        flat[positions] = values.detach()

    @torch.no_grad()
    def _split(self) -> None:
        """Read the values of B from θ."""
        self.active_fwd_weights.copy_(self.theta.view(-1)[self.positions])
        if self._lent is not None:
            self._lent = self.active_fwd_weights.detach().clone()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "TopKastLinear":
        self._merge()
        self._lent = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self._merge()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if f"{prefix}theta" in state_dict:
            self._split()

    def __setattr__(self, name: str, value: Any) -> None:
        """Let ``weight`` take a parameter too, of which it copies the values."""
        super().__setattr__(name, value.detach() if name == "weight" else value)
