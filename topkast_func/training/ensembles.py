"""Steps within transforms of `torch.func`: ensembles one member after another, derivatives not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, is_batchedtensor
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

DERIVED = (
    "a step is not differentiated, so that it does not run within torch.func.grad, jacrev, jvp and "
    "their like, nor takes dual tensors (torch.vmap works): call it outside, and take derivatives "
    "of tk.penalized_loss or tk.sparse_forward, at tk.dense_params(state) and tk.masks_of(state)"
)

Leaves = tuple[Any, ...]


def is_ensemble(tree: Any) -> bool:
    """Return whether `torch.vmap` maps over a tensor of a tree.

    Args:
        tree: What a step takes.

    Returns:
        Whether it does.

    Raises:
        RuntimeError: A transform other than `torch.vmap` is at work, for which all that a step
            returns would be constant.
    """
    transforms = get_interpreter_stack() or ()
    if any(transform.key() != TransformType.Vmap for transform in transforms) or _is_dual(tree):
        raise RuntimeError(DERIVED)
    if not transforms:
        return False
    return any(isinstance(leaf, Tensor) and is_batchedtensor(leaf) for leaf in tree_leaves(tree))


def _is_dual(tree: Any) -> bool:
    """Return whether forward mode follows a tensor of a tree."""
    if forward_ad._current_level < 0:
        return False
    unpack: Any = forward_ad.unpack_dual
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return any(unpack(leaf).tangent is not None for leaf in leaves)


def by_member(run: Callable[..., Any], *trees: Any) -> Any:
    """Run a function on each member of an ensemble.

    Args:
        run: From trees to a tree of tensors, of the same structure and shapes for each member.
        *trees: Its arguments, over some of whose tensors `torch.vmap` maps.

    Returns:
        What it returns, mapped over.
    """
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
        results = tuple(torch.stack(several) for several in zip(*members, strict=True))
        return results, (0,) * len(results)
