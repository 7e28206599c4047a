"""Ensembles under `torch.vmap`: work that the host decides on, one member after another."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, peek_interpreter_stack
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

Leaves = tuple[Any, ...]


def is_ensemble(tree: Any) -> bool:
    """Return whether `torch.vmap` maps over a tensor of a tree."""
    if peek_interpreter_stack() is None:
        return False
    return any(isinstance(leaf, Tensor) and is_batchedtensor(leaf) for leaf in tree_leaves(tree))


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
