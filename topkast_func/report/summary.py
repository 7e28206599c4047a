"""What a state consists of: one row for each parameter."""

from html import escape
from io import StringIO
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from topkast_func.kernels.engines import EngineName
from topkast_func.report.explain import choices
from topkast_func.training.state import TrainState, masks_of

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 1000
"""Characters of a line of the printed table, at most: no name is cut short."""


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
        reason: Why; for a parameter that is not sparse, that it is left dense or frozen.
        bytes: Of what is trained: values, where they stand, and optimiser slots; θ at rest, and
            in dense storage the masks, apart.
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


class Summary:
    """A table of parameters; prints as text, and as HTML in a notebook.

    Args:
        rows: One for each parameter.

    Attributes:
        rows: The same.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __rich__(self) -> "Table":
        """Return the table for `rich`."""
        from rich.table import Table
        from rich.text import Text

        table = Table(*HEAD)
        for cells in self._cells():
            table.add_row(*map(Text, cells))
        return table

    def __repr__(self) -> str:
        """Print the table as text."""
        from rich.console import Console

        text = StringIO()
        plain = Console(file=text, width=WIDTH, color_system=None, force_jupyter=False)
        plain.print(self.__rich__())
        return text.getvalue()

    def _repr_html_(self) -> str:
        lines = [_line("th", HEAD), *(_line("td", cells) for cells in self._cells())]
        return f"<table>{''.join(lines)}</table>"

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                " × ".join(map(str, row.shape)),
                f"{row.forward:,}",
                f"{row.backward:,}",
                f"{row.forward_density:.1%}",
                f"{row.backward_density:.1%}",
                row.engine,
                row.reason,
                f"{row.bytes:,}",
            )
            for row in self.rows
        ]


SETS = ("|A|", "|B|", "density of A", "density of B")
HEAD = ("parameter", "shape", *SETS, "engine", "why", "bytes")


def summary(state: TrainState, batch_size: int = 256, engine: EngineName = "auto") -> Summary:
    """Tell what a state consists of.

    Args:
        state: The state.
        batch_size: Rows of activations that a layer sees at a time; see `explain`, also for
            what engines are told of a state that was not made of a module.
        engine: What `make_train_step` is told.

    Returns:
        The table. ``rows`` holds it as data.

    Raises:
        ImportError: The engine asked for is not installed.
        TypeError: The engine asked for does not support the dtype or device.
        ValueError: The batch size is below 1 or there is no such engine.

    Example:
        >>> import torch
        >>> from topkast_func import TopKastConfig, init_state, sgd
        >>> state = init_state(torch.nn.Linear(10, 10), TopKastConfig(), sgd(lr=0.1))
        >>> [(row.name, row.forward, row.backward) for row in summary(state).rows]
        [('weight', 10, 20), ('bias', 10, 10)]
    """
    chosen, masks = choices(state, batch_size, engine), masks_of(state)
    rows = []
    for name, shape in state.weights.shapes().items():
        size = shape.numel()
        sets = masks.get(name)
        forward, backward = (int(mask.sum()) for mask in sets) if sets else (size, size)
        choice = chosen.get(name)
        rows.append(
            Row(
                name,
                tuple(shape),
                forward,
                backward,
                forward / size,
                backward / size,
                choice.engine if choice else "torch",
                choice.reason if choice else "left dense",
                _bytes(state, name),
            )
        )
    rows += [_frozen(name, tensor) for name, tensor in state.frozen.items()]
    return Summary(rows)


def _frozen(name: str, tensor: Tensor) -> Row:
    size = tensor.numel()
    return Row(name, tuple(tensor.shape), size, 0, 1.0, 0.0, "torch", "frozen", 0)


def _bytes(state: TrainState, name: str) -> int:
    slots = [tree[name] for tree in state.optimizer.slots.values() if name in tree]
    trained = (state.weights.values()[name], state.weights.stands(name), slots)
    return sum(leaf.nbytes for leaf in tree_leaves(trained) if isinstance(leaf, Tensor))


def _line(tag: str, cells: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
