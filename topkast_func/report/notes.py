"""Notes below the table of a summary: why weights are dense, and what may not be meant."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

from torch import nn

from topkast_func.config import TopKastConfig
from topkast_func.config.selection import weights_among
from topkast_func.kernels.engines import ALPHA
from topkast_func.model.alone import uncompiled
from topkast_func.model.axes import Axes, empty_lines
from topkast_func.model.modules import ties
from topkast_func.report.table import families, some
from topkast_func.types import Masks

UNKNOWN = "of no layer that kernels know"
"""How it may end."""

ROLES = {
    "outputs": "warning: {} without an entry in A, so outputs without an input",
    "inputs": "{} without an entry in A, so inputs without an effect",
}
"""What is said where an axis of a weight, by what it stands for, has empty lines."""

IF_UNKNOWN = " where weights are [out, in]"
"""What is added where it is not known what an axis stands for."""


class Row(NamedTuple):
    """One parameter.

    Attributes:
        name: Its name.
        shape: Its shape.
        forward: Entries in A.
        backward: Entries in B; none of a parameter that requires no gradient.
        forward_density: Share of entries in A.
        backward_density: Share of entries in B.
        engine: Who computes it.
        reason: Why; for a parameter that is not sparse, why it is dense.
        bytes: Of what is trained. Of a state: values, where they stand, and optimiser slots; θ at
            rest, and in dense storage the masks, apart. Of a module that `sparsify` has changed:
            the parameter, and its sets.
        empty_rows: Places along the first axis that have no entry in A.
        empty_columns: Places along the second that have none, of those of all groups.
        axes: How layers read the two: whether it is [out, in, …] or [in, out, …]; none where
            that is not known.
    """

    name: str
    shape: tuple[int, ...]
    forward: int
    backward: int
    forward_density: float
    backward_density: float
    engine: str
    reason: str
    bytes: int
    empty_rows: int = 0
    empty_columns: int = 0
    axes: tuple[Axes, ...] = ()


def notes(
    rows: Sequence[Row], sparse: Iterable[str], model: object, config: TopKastConfig | None
) -> list[str]:
    """Return what is to be said of the parameters.

    Args:
        rows: One for each.
        sparse: Names of the sparse ones.
        model: The module; of anything else the roles of weights are not known.
        config: The configuration; None for one that selects by default.

    Returns:
        Sentences.
    """
    sparse = set(sparse)
    dense = _by_reason(row for row in rows if row.name not in sparse)
    told = [f"{families(names)}: {why}" for why, names in dense.items()]
    off = _by_reason(row for row in rows if row.name in sparse and row.reason.startswith(ALPHA))
    return [
        *([f"dense: {'; '.join(told)}"] if told else []),
        *_by_default([row.name for row in rows if row.name in sparse], model, config),
        *(f"warning: on no kernel, {why}: {families(names)}" for why, names in off.items()),
        *_empty(rows),
    ]


def _by_reason(rows: Iterable[Row]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        found[row.reason].append(row.name)
    return found


def _by_default(sparse: list[str], model: object, config: TopKastConfig | None) -> list[str]:
    """Warn of weights of a kind that one often keeps dense, where nobody asked for them."""
    model = uncompiled(model)
    if not isinstance(model, nn.Module) or (config and config.sparse is not None):
        return []
    tied = ties(model)
    last = weights_among(dict(model.named_parameters(remove_duplicate=False)))[-1:]
    kinds = {tied.get(name, name): "output layer" for name in last}
    kinds |= {
        f"{name}.weight".lstrip("."): "embedding"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    kinds |= dict.fromkeys(tied.values(), "tied")
    found = {name: kinds[name] for name in sparse if name in kinds}
    told = ", ".join(f"{name} ({kind})" for name, kind in found.items())
    return [f"warning: sparse by default, keep_dense= leaves them dense: {told}"] if found else []


def with_lines(row: Row, sets: Masks | None, axes: tuple[Axes, ...]) -> Row:
    """Return the row with what is empty of a sparse parameter, and with how layers read it."""
    groups = axes[0].groups if axes else 1
    rows, columns = (0, 0) if sets is None else empty_lines(sets.forward, groups)
    return row._replace(empty_rows=rows, empty_columns=columns, axes=axes)


def _empty(rows: Sequence[Row]) -> list[str]:
    found: dict[str, list[str]] = defaultdict(list)
    for role in ROLES:
        for row in rows:
            for axes in row.axes or (None,):
                line, empty, of = _lines(row, axes)[role]
                if empty:
                    told = ROLES[role].format(line) + ("" if axes else IF_UNKNOWN)
                    found[told].append(f"{row.name} {empty} of {of}")
    return [f"{what}: {some(items)}" for what, items in found.items()]


def _lines(row: Row, axes: Axes | None) -> dict[str, tuple[str, int, int]]:
    """Return what runs along the axis of each role, how many of it are empty, and of how many."""
    axes = axes or Axes(first=True)
    counts = (
        ("rows", row.empty_rows, prod(row.shape[:1])),
        ("columns", row.empty_columns, axes.groups * prod(row.shape[1:2])),
    )
    return dict(zip(ROLES, counts if axes.first else counts[::-1], strict=True))
