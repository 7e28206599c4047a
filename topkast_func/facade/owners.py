"""The sparse weights of a sparsified module, the layers that have them, and its summary."""

from typing import TypeAlias

from torch import nn

from topkast_func.config import TopKastConfig
from topkast_func.config.selection import reason_dense
from topkast_func.facade.sparse_weight import SparseWeight, weights_of
from topkast_func.model.axes import Axes, axes_by_name
from topkast_func.report.notes import Row, notes, with_lines
from topkast_func.report.summary import Summary

Owners: TypeAlias = dict[str, list[tuple[nn.Module, SparseWeight]]]
"""The layers that have each sparse weight, by its name: several where it is tied."""

BYTES = "bytes: parameters and sets; gradients and slots of the optimiser are not counted"
"""What the last column of a summary counts of a module."""


def owners_of(model: nn.Module) -> Owners:
    """Return the sparse weights of a module and the layers that have them."""
    found: Owners = {}
    for module in model.modules():
        for weight in weights_of(module).values():
            found.setdefault(weight.rule.name, []).append((module, weight))
    return found


def first_owners(model: nn.Module) -> dict[str, tuple[nn.Module, SparseWeight]]:
    """Return the sparse weights of a module, each with the first layer that has it, by name."""
    return {name: owners[0] for name, owners in owners_of(model).items()}


def summary_of(model: nn.Module, config: TopKastConfig) -> Summary:
    """Describe what a module consists of, one row for each parameter.

    Args:
        model: The module.
        config: What it was made sparse by.

    Returns:
        The table.
    """
    found = owners_of(model)
    owners = {id(weight.raw(m)): (m, weight) for several in found.values() for m, weight in several}
    axes = axes_by_name(model)
    rows = [
        _row(name, parameter, config, axes.get(name, ()), *owners.get(id(parameter), (None, None)))
        for name, parameter in model.named_parameters()
    ]
    return Summary(rows, [*notes(rows, found, model, config), BYTES])


def _row(
    name: str,
    parameter: nn.Parameter,
    config: TopKastConfig,
    axes: tuple[Axes, ...],
    layer: nn.Module | None,
    weight: SparseWeight | None,
) -> Row:
    size, engine = parameter.numel(), "torch"
    trained = parameter.requires_grad
    reason = reason_dense(name, parameter, config) if trained else "frozen"
    masks = None
    forward, backward, stored = size, size if trained else 0, parameter.nbytes
    if layer is not None and weight is not None:
        masks = weight.masks(layer)
        forward, backward = int(masks.forward.sum()), int(masks.backward.sum())
        engine, reason = weight.rule.choice(parameter, forward, backward)
        stored += weight.sets(layer).nbytes
    row = Row(
        name,
        tuple(parameter.shape),
        forward,
        backward,
        forward / size,
        backward / size,
        engine,
        reason,
        stored,
    )
    return with_lines(row, masks, axes)
