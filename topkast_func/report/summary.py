"""What a state consists of: one row for each parameter."""

from collections.abc import Sequence
from html import escape

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from topkast_func.checks import check_type
from topkast_func.config import TopKastConfig
from topkast_func.config.selection import reason_dense
from topkast_func.kernels.engines import Choice, EngineName
from topkast_func.model.alone import uncompiled
from topkast_func.model.axes import axes_by_name
from topkast_func.report.explain import choices
from topkast_func.report.notes import Row, notes, with_lines
from topkast_func.report.table import in_bytes, paragraph, table
from topkast_func.training.fits_model import check_tensors
from topkast_func.training.readout import masks_of
from topkast_func.training.state import TrainState
from topkast_func.types import Model


class Summary:
    """A table of parameters; prints as text, and as HTML in a notebook.

    The text is as wide as the terminal, 80 columns where there is none: names that are too long
    for it lose their beginning. HTML has them whole, and why each layer has its engine.

    Args:
        rows: One for each parameter.
        notes: What is said below the table.

    Attributes:
        rows: The same.
        notes: The same.
    """

    def __init__(self, rows: list[Row], notes: Sequence[str] = ()) -> None:
        self.rows = rows
        self.notes = list(notes)

    def __repr__(self) -> str:
        """Print the table as text."""
        head = ("parameter", "shape", "|A|", "|B|", "A", "B", "engine", "bytes")
        rows = [
            (
                row.name,
                "×".join(map(str, row.shape)),
                f"{row.forward:,}",
                f"{row.backward:,}",
                f"{row.forward_density:.1%}",
                f"{row.backward_density:.1%}",
                row.engine,
                in_bytes(row.bytes),
            )
            for row in self.rows
        ]
        return "\n".join([table(head, rows), *map(paragraph, self.notes)])

    def _repr_html_(self) -> str:
        lines = [_line("th", HEAD), *(_line("td", cells) for cells in self._cells())]
        said = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"<table>{''.join(lines)}</table>{said}"

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
BYTES = "bytes: values, where they stand, and slots of the optimiser"
"""What the last column counts of a state."""

HEAD = ("parameter", "shape", *SETS, "engine", "why", "bytes")


def summary(
    state: TrainState,
    batch_size: int = 256,
    engine: EngineName = "auto",
    model: Model | None = None,
    config: TopKastConfig | None = None,
) -> Summary:
    """Describe what a state consists of.

    Below the table it says why weights are dense, and warns of weights that no kernel computes,
    and of rows and columns of A without an entry. An output without an input is a constant: a
    BatchNorm behind it divides what rounding has left of its spread by as little, so that the
    gradients of such a row differ from one processor to another, and where they are compiled.

    Args:
        state: The state.
        batch_size: Rows of activations that a layer sees at a time; see `explain`, also for
            what engines are told of a state that was not made of a module.
        engine: What `make_train_step` is told.
        model: If given, it says which axis of a weight is that of its layer's outputs, and
            embeddings, tied weights and the output layer are warned of where they are sparse by
            default.
        config: The configuration, if it is to say more exactly why weights are dense.

    Returns:
        The table. ``rows`` holds it as data, ``notes`` what is said below it.

    Raises:
        ImportError: The engine asked for is not installed.
        TypeError: The engine asked for does not support the dtype or device, ``state`` is no
            state, or ``config`` no configuration.
        ValueError: The batch size is below 1, there is no such engine, or the state is of another
            model.

    Example:
        >>> import torch
        >>> from topkast_func import TopKastConfig, init_state, sgd
        >>> state = init_state(torch.nn.Linear(10, 10), TopKastConfig(), sgd(lr=0.1))
        >>> [(row.name, row.forward, row.backward) for row in summary(state).rows]
        [('weight', 10, 20), ('bias', 10, 10)]
    """
    if config is not None:
        check_type("config", config, TopKastConfig)
    chosen, masks = choices(state, batch_size, engine), masks_of(state)
    model = uncompiled(model)
    if isinstance(model, nn.Module):
        check_tensors(state, model)
    values, axes = state.weights.values, axes_by_name(model)
    rows = []
    for name, shape in state.weights.shapes().items():
        size = shape.numel()
        sets = masks.get(name)
        forward, backward = (int(mask.sum()) for mask in sets) if sets else (size, size)
        choice = chosen.get(name) or Choice("torch", reason_dense(name, values[name], config))
        row = Row(
            name,
            tuple(shape),
            forward,
            backward,
            forward / size,
            backward / size,
            *choice,
            _bytes(state, name),
        )
        rows.append(with_lines(row, sets, axes.get(name, ())))
    rows += [_frozen(name, tensor) for name, tensor in state.frozen.items()]
    return Summary(rows, [*notes(rows, masks, model, config), BYTES])


def _frozen(name: str, tensor: Tensor) -> Row:
    size = tensor.numel()
    return Row(name, tuple(tensor.shape), size, 0, 1.0, 0.0, "torch", "frozen", 0)


def _bytes(state: TrainState, name: str) -> int:
    slots = [tree[name] for tree in state.optimizer.slots.values() if name in tree]
    part = state.split[name].slots if name in state.split else {}
    trained = (state.weights.values[name], state.weights.index_of(name), slots, part)
    return sum(leaf.nbytes for leaf in tree_leaves(trained) if _is_here(leaf))


def _is_here(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_meta


def _line(tag: str, cells: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
