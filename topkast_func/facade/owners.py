"""The sparse weights of a sparsified module, the layers that have them, and its summary."""

from collections import Counter
from typing import TypeAlias
from uuid import uuid4

import torch
from torch import nn

from topkast_func.config import TopKastConfig
from topkast_func.config.allocation import shared_among_all
from topkast_func.config.selection import reason_dense
from topkast_func.facade.sparse_weight import SparseWeight, weights_of
from topkast_func.facade.watched import all_watched
from topkast_func.masks import counts_among
from topkast_func.model.axes import Axes, axes_by_name
from topkast_func.report.notes import Row, notes, with_lines
from topkast_func.report.summary import Summary
from topkast_func.sparsity import Allocation

Owners: TypeAlias = dict[str, list[tuple[nn.Module, SparseWeight]]]
"""The layers that have each sparse weight, by its name: several where it is tied."""

BYTES = "bytes: parameters and sets; gradients and slots of the optimiser are not counted"
"""What the last column of a summary counts of a module."""


def owners_in(model: nn.Module) -> Owners:
    """Return the sparse weights of a module, whoever made them, and the layers that have them."""
    found: Owners = {}
    for module in model.modules():
        for weight in weights_of(module).values():
            found.setdefault(weight.rule.name, []).append((module, weight))
    return found


def first(owners: Owners) -> dict[str, tuple[nn.Module, SparseWeight]]:
    """Return the sparse weights, each with the first layer that has it, by name."""
    return {name: several[0] for name, several in owners.items()}


def named_now(model: nn.Module, owners: Owners) -> dict[str, tuple[nn.Module, SparseWeight]]:
    """Return what `first` does, by the names that the parameters have in the model as it is now."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(weight.raw(m))]: (m, weight) for m, weight in first(owners).values()}


def parameters_of(owners: Owners) -> dict[str, nn.Parameter]:
    """Return the parameters that hold θ, or φ, of sparse weights, by name."""
    return {name: weight.raw(layer) for name, (layer, weight) in first(owners).items()}


def shapes_of(owners: Owners) -> dict[str, torch.Size]:
    """Return the shapes of the sparse weights by name."""
    return {name: raw.shape for name, raw in parameters_of(owners).items()}


def claimed(model: nn.Module) -> str:
    """Give the sparse weights of a module to a new sparsifier; return the mark that they bear."""
    mark = uuid4().hex
    for several in owners_in(model).values():
        for _, weight in several:
            weight.rule = weight.rule._replace(mark=mark)
    return mark


def owners_of(model: nn.Module, mark: str) -> Owners:
    """Return the sparse weights of a sparsifier, whose names and parameters are one to one.

    Args:
        model: The module.
        mark: The mark of the sparsifier.

    Returns:
        The weights and the layers that have them.

    Raises:
        RuntimeError: A weight is of another sparsifier or no parameter any more, two parameters go
            by one name, as those of a copied layer do, or two names by one parameter.
    """
    found = owners_in(model)
    placed = [(name, m, weight) for name, several in found.items() for m, weight in several]
    if any(weight.rule.mark != mark for _, _, weight in placed):
        raise RuntimeError(
            f"{_places(model, [(m, w) for _, m, w in placed if w.rule.mark != mark])} were made "
            "sparse by another call of tk.sparsify than the one this sparsifier is of: if the "
            "model was densified, and made sparse anew since, use the sparsifier of that call; if "
            "they came from another model, tk.densify this one and sparsify it again"
        )
    pairs = {(name, id(weight.raw(m))) for name, m, weight in placed}
    names, parameters = (Counter(pair[i] for pair in pairs) for i in (0, 1))
    if not len(pairs) == len(names) == len(parameters):
        twofold = [(m, w) for n, m, w in placed if max(names[n], parameters[id(w.raw(m))]) > 1]
        raise RuntimeError(
            f"{_places(model, twofold)} were copied, tied or given other parameters after "
            "tk.sparsify, which then has no sets of their own for them: put back what was there, "
            "keep a copy, such as a target network, outside the model, or tk.densify the model, "
            "change it then, and sparsify it again"
        )
    return found


def follow(owners: Owners, config: TopKastConfig, step: int, seed: int) -> None:
    """Tell each weight at which step it is, for sets that are chosen from a loaded θ."""
    for name, allocation in shared_among_all(shapes_of(owners), config, step).items():
        if config.schedule.settled(step):
            allocation = Allocation(allocation.forward, allocation.forward)
        for _, weight in owners[name]:
            weight.rule = weight.rule._replace(allocation=allocation, step=step, seed=seed)


def check_apart(model: nn.Module) -> None:
    """Check that no layer outside a module goes on to read φ where the module is to have α.

    Args:
        model: The module.

    Raises:
        ValueError: A weight under powerpropagation is tied to one of a layer outside.
    """
    owners = [owner for several in owners_in(model).values() for owner in several]
    phi = [(m, w) for m, w in owners if w.rule.config.powerprop > 1.0 and w.key in m._parameters]
    inside, elsewhere = {id(m) for m, _ in owners}, all_watched()
    outside = {id(weight.raw(m)) for m, weight in elsewhere if id(m) not in inside}
    if tied := [(m, w) for m, w in phi if id(m._parameters[w.key]) in outside]:
        raise ValueError(
            f"{_places(model, tied)} are tied to weights of sparse layers outside this module, "
            "which read φ of powerpropagation there and would go on with α in its place: densify "
            "a module that has all of these layers, or give this one a parameter of its own first"
        )


def check_stage(owners: Owners) -> None:
    """Check that the sets are no smaller than their sparsifier knows them to be.

    Args:
        owners: The sparse weights.

    Raises:
        RuntimeError: They were loaded, and are of a later stage of the schedule.
    """
    for name, (layer, weight) in first(owners).items():
        derived = weight.derived(layer)
        if weight.given is None or derived is None or derived.counts is None:
            continue
        if derived.counts[0] < weight.given[0]:
            raise RuntimeError(
                f"the sets of {name!r} have |A|, |B| = {derived.counts}, those that were chosen "
                f"last {weight.given}: they were loaded from a later stage of the schedule, and a "
                "refresh would take them back to this one. Load the sparsifier's state dict too, "
                "sparsifier.load_state_dict(…), or, to go back, that which sparsifier.state_dict() "
                "returns now"
            )


def are_of_stage(owners: Owners, config: TopKastConfig, step: int) -> bool:
    """Return whether sets that were not chosen here have the sizes of the stage of a step."""
    asked = counts_among(shapes_of(owners), config, step)
    loaded = {n: w.derived(layer) for n, (layer, w) in first(owners).items() if w.given is None}
    return all(d is None or d.counts in {None, asked[name]} for name, d in loaded.items())


def _places(model: nn.Module, owners: list[tuple[nn.Module, SparseWeight]]) -> list[str]:
    """Name sparse weights by where they are, whatever they were called when made sparse."""
    paths = {id(module): f"{path}." if path else "" for path, module in model.named_modules()}
    return [paths[id(layer)] + weight.key for layer, weight in owners]


def summary_of(model: nn.Module, config: TopKastConfig, found: Owners) -> Summary:
    """Describe what a module consists of, one row for each parameter.

    Args:
        model: The module.
        config: What it was made sparse by.
        found: Its sparse weights.

    Returns:
        The table.
    """
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
