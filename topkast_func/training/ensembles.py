"""Work within transforms of `torch.func`: ensembles one member after another, derivatives not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, is_batchedtensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

DERIVED = (
    "{} is not differentiated, so that it does not run within torch.func.grad, jacrev, jvp and "
    "their like, nor takes dual tensors (torch.vmap works): call it outside, and take derivatives "
    "of tk.penalized_loss or tk.sparse_forward, at tk.dense_params(state) and tk.masks_of(state)"
)

ESCAPED = "may have escaped from inside a function being vmapped"
"""What torch says of a tensor that is mapped over where nothing is."""

CLOSED_OVER = (
    "torch.vmap maps over a tensor that the model or loss_fn reads and is not given: make it a "
    "part of the batch"
)

UNEVEN = (
    "what the members of an ensemble return differs in shape, as their steps are of different "
    "stages of a schedule: call it for each of them by itself"
)

Leaves = tuple[Any, ...]


def is_mapped(what: str, tree: Any) -> bool:
    """Return whether `torch.vmap` is at work, so that `mapped` is to do what is called.

    Args:
        what: What is called, for the error.
        tree: What it takes.

    Returns:
        Whether it is.

    Raises:
        RuntimeError: Another transform is at work, for which all that is returned would be
            constant.
    """
    transforms = get_interpreter_stack() or ()
    if any(transform.key() != TransformType.Vmap for transform in transforms) or _is_dual(tree):
        raise RuntimeError(DERIVED.format(what))
    return bool(transforms)


def mapped(run: Callable[..., Any], *trees: Any) -> Any:
    """Run a function within `torch.vmap`: on each member that it maps over, or else once.

    Args:
        run: From trees to a tree of tensors, of the same structure and shapes for each member.
        *trees: Its arguments.

    Returns:
        What it returns, mapped over where an argument is.

    Raises:
        ValueError: There are no members, or what they return differs in shape.
        RuntimeError: `torch.vmap` maps over what is no argument.
    """
    try:
        if any(isinstance(leaf, Tensor) and is_batchedtensor(leaf) for leaf in tree_leaves(trees)):
            return _by_member(run, *trees)
        with temporarily_clear_interpreter_stack():
            return run(*trees)
    except RuntimeError as reason:
        if ESCAPED not in str(reason):
            raise
        raise RuntimeError(CLOSED_OVER) from reason


def _is_dual(tree: Any) -> bool:
    """Return whether forward mode follows a tensor of a tree."""
    if forward_ad._current_level < 0:
        return False
    unpack: Any = forward_ad.unpack_dual
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return any(unpack(leaf).tangent is not None for leaf in leaves)


def _by_member(run: Callable[..., Any], *trees: Any) -> Any:
    """Run a function on each member of an ensemble."""
    leaves, structure = tree_flatten(trees)
    found: list[TreeSpec] = []

    def flat(*leaves: Any) -> Leaves:
        results, of_results = tree_flatten(run(*tree_unflatten(leaves, structure)))
        found[:] = [of_results]
        return tuple(results)

    results = _ByMember.apply(flat, *leaves)  # type: ignore[no-untyped-call]
    return tree_unflatten(results, found[0])


class _ByMember(torch.autograd.Function):
    @staticmethod
    def forward(run: Callable[..., Leaves], *leaves: Any) -> Leaves:
        raise NotImplementedError("there is no ensemble")

    @staticmethod
    def setup_context(ctx: Any, inputs: Leaves, output: Leaves) -> None:
        """Keep nothing: a step is not differentiated."""

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], run: Callable[..., Leaves], *leaves: Any
    ) -> tuple[Leaves, tuple[int, ...]]:
        axes = dims[1:]
        members = [
            run(*(x if d is None else x.select(d, i) for x, d in zip(leaves, axes, strict=True)))
            for i in range(info.batch_size)
        ]
        if not members:
            raise ValueError("torch.vmap maps over an ensemble of no members, which has no results")
        several = [*zip(*members, strict=True)]
        if any(len({leaf.shape for leaf in leaves}) > 1 for leaves in several):
            raise ValueError(UNEVEN)
        return tuple(map(torch.stack, several)), (0,) * len(several)
