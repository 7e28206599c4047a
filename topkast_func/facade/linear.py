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

from topkast_func.checks import check_count, check_number, check_order
from topkast_func.config.selection import check_params
from topkast_func.kernels.engines import EngineName, choose
from topkast_func.kernels.linear import layer_of, sparse_linear
from topkast_func.kernels.pattern import BlockRows, Pattern, flat, flattened, nested, pattern_of
from topkast_func.model.alpha import split
from topkast_func.ranking import kept, magnitudes, top_sets
from topkast_func.storage.index import carry, old_slots

Index = tuple[Tensor, ...]

PATTERN = (
    *(f"{part}_{field}" for part in Pattern._fields[:3] for field in BlockRows._fields),
    "places",
)
"""Buffers of a layer that hold its pattern; a state dict has `POSITIONS` in their stead."""

POSITIONS = ("positions_fwd", "positions_justbwd")

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
        engine: Who computes the products: "numba", "dense", "reference" or "torch_sparse";
            "auto" for the fastest that supports the dtype and device.

    Attributes:
        active_fwd_weights: Parameter, [|B|]: θ on A, then on B∖A, each in row-major order.
        bias: Parameter, [out_features], or None.
        theta: Buffer, [out_features, in_features]; read ``weight`` instead.
        pattern: A and B∖A as the kernels read them, int32, in buffers of their own.

    Raises:
        ImportError: The engine asked for is not installed.
        TypeError: A size or sparsity is no number, or the engine does not support the dtype
            or device.
        ValueError: A size or sparsity is out of range, or there is no such engine.

    Departures:
        The values of B∖A stay in ``active_fwd_weights`` beside those of A, where the seed
        holds zeros; the forward pass does not see them. Inputs may have any number of
        leading dimensions, and get a gradient in evaluation mode too. A state dict holds
        ``positions_fwd`` and ``positions_justbwd``, of which the pattern is made anew, and copies
        of all tensors: what is trained later does not change it.

    Example:
        >>> layer = TopKastLinear(10, 16, p_forward=0.6, p_backward=0.4)
        >>> layer(torch.zeros(3, 10)).shape, len(layer.set_fwd), len(layer.set_justbwd)
        (torch.Size([3, 16]), 64, 32)
    """

    theta: Tensor
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
        engine: EngineName = "auto",
    ) -> None:
        super().__init__()
        self.in_features = check_count("in_features", in_features, 1)
        self.out_features = check_count("out_features", out_features, 1)
        self.p_forward = check_number("p_forward", p_forward, 0.0, 1.0)
        self.p_backward = check_number("p_backward", p_backward, 0.0, 1.0)
        check_order(self.p_forward, self.p_backward, "p_backward", "p_forward")
        forward, backward = self._counts()
        self.set_fwd, self.set_justbwd = range(forward), range(forward, backward)
        theta = torch.empty(self.out_features, self.in_features, device=device, dtype=dtype)
        self.register_buffer("theta", theta)
        self.active_fwd_weights = nn.Parameter(theta.new_empty(backward))
        offset = nn.Parameter(theta.new_empty(self.out_features)) if bias else None
        self.register_parameter("bias", offset)
        self.engine: EngineName = engine
        self._lent: Tensor | None = None
        first = self._pattern_at(torch.arange(backward, device=theta.device))
        for name, index in zip(PATTERN, flattened(first), strict=True):
            self.register_buffer(name, index, persistent=False)
        choose(engine, layer_of(self.active_fwd_weights, first, self._shape, batch=1))
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
        shape = self._shape
        if tuple(value.shape) not in (shape, (self.theta.numel(),)):
            raise ValueError(f"weight must have shape {shape}, got {tuple(value.shape)}")
        with torch.no_grad():
            self.theta.copy_(value.reshape(shape))
        self._split()

    @property
    def pattern(self) -> Pattern:
        """The sets, as the kernels read them."""
        return nested([getattr(self, name) for name in PATTERN])

    @property
    def positions(self) -> Tensor:
        """Where in the flat θ each of ``active_fwd_weights`` belongs, int64, [|B|]."""
        return self.pattern.flat_index((1, 1), self.theta.shape)

    @property
    def positions_fwd(self) -> Tensor:
        """Where in the flat θ the values of A belong, int64, [|A|], ascending."""
        return flat(self.pattern.forward, (1, 1), self._shape)

    @property
    def positions_justbwd(self) -> Tensor:
        """Where in the flat θ the values of B∖A belong, int64, [|B∖A|], ascending."""
        return flat(self.pattern.exploring, (1, 1), self._shape)

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
        sets = top_sets("weight", scores, *self._counts())
        self._choose(pattern_of(*sets), optimizer)

    def arrange(self, positions: Tensor, optimizer: Optimizer | None = None) -> None:
        """Let the parameter hold θ at ``positions``; gradient and slots move along.

        L-BFGS, whose history is one vector over all parameters, starts its history anew.

        Args:
            positions: Flat indices into θ, int64, [|B|], those of A first.
            optimizer: The optimiser, if it has slots but has made no step in this process.

        Raises:
            ValueError: The positions are not |B| different ones; nothing has changed.
        """
        self._merge()
        self._choose(self._pattern_at(positions), optimizer)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return θ on A and θ on B∖A, as the parameter holds them, up to date."""
        self._catch_up()
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
        self._catch_up()
        values, offset = self.active_fwd_weights, self.bias
        return sparse_linear(inputs, values, self.pattern, self._shape, offset, self.engine)

    def extra_repr(self) -> str:
        """Describe the layer for ``print``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"p_forward={self.p_forward}, p_backward={self.p_backward}, "
            f"bias={self.bias is not None}, engine={self.engine!r}"
        )

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _counts(self) -> tuple[int, int]:
        """Return how many entries A and B have."""
        size = self.out_features * self.in_features
        return kept(self.p_forward, size), kept(self.p_backward, size)

    def _unravel(self, flat: Tensor) -> Index:
        return flat // self.in_features, flat % self.in_features

    def _pattern_at(self, positions: Tensor) -> Pattern:
        """Index the sets whose flat indices are ``positions``, those of A first."""
        sizes = [len(self.set_fwd), len(self.active_fwd_weights)]
        masks = positions.new_zeros((2, self.theta.numel()), dtype=torch.bool)
        for mask, size in zip(masks, sizes, strict=True):
            mask[positions[:size]] = True
        if masks.sum(1).tolist() != sizes:
            raise ValueError(f"positions must be {sizes[1]} different places of the weight")
        return pattern_of(*masks.view(2, *self._shape))

    @torch.no_grad()
    def _choose(self, pattern: Pattern, optimizer: Optimizer | None) -> None:
        """Take over new sets; gradient and slots follow their weights."""
        parameter, old = self.active_fwd_weights, self.positions
        new = pattern.flat_index((1, 1), self.theta.shape)
        source = old_slots(old, new, self.theta.numel())
        optimizers = {*_OPTIMIZERS, *([optimizer] if optimizer else [])}
        slots = [s for o in optimizers for s in o.state.get(parameter, {}).values()]
        for slot in (parameter.grad, *slots):
            if isinstance(slot, Tensor) and slot.shape == parameter.shape:
                slot.copy_(carry(slot, source))
        for lbfgs in (o for o in optimizers if isinstance(o, LBFGS)):
            trained = (p for group in lbfgs.param_groups for p in group["params"])
            if any(p is parameter for p in trained) and not torch.equal(old, new):
                lbfgs.state.clear()
        self._hold(pattern)
        self._split()

    def _hold(self, pattern: Pattern) -> None:
        """Write the pattern where the old one is, unless that is on another device."""
        for name, new in zip(PATTERN, flattened(pattern), strict=True):
            old = getattr(self, name)
            setattr(self, name, old.copy_(new) if old.device == new.device else new)

    def _catch_up(self) -> None:
        """Let the values follow what was written to a lent θ."""
        if not torch.compiler.is_compiling() and self._lent is not None:
            self._merge()

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
        self.active_fwd_weights.copy_(split(self.theta, self.positions))
        if self._lent is not None:
            self._lent = self.active_fwd_weights.detach().clone()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "TopKastLinear":
        self._merge()
        self._lent = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self._merge()
        held: dict[str, Tensor] = {}
        super()._save_to_state_dict(held, prefix, keep_vars)
        destination.update({n: t if keep_vars else t.clone() for n, t in held.items()})
        destination.update({f"{prefix}{name}": getattr(self, name) for name in POSITIONS})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        self._buffers.update({name: getattr(self, name) for name in POSITIONS})
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        positions = torch.cat([self._buffers.pop(name) for name in POSITIONS])  # type: ignore[misc]
        try:
            self._hold(self._pattern_at(positions))
        except (IndexError, ValueError) as reason:
            arguments[-1].append(f"{prefix}{POSITIONS[0]}, {prefix}{POSITIONS[1]}: {reason}")
        if f"{prefix}theta" in state_dict:
            self._split()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come out of a pickle, maybe as the first layer of a process."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _meet_optimizers()

    def __setattr__(self, name: str, value: Any) -> None:
        """Let ``weight`` take a parameter too, of which it copies the values."""
        super().__setattr__(name, value.detach() if name == "weight" else value)
