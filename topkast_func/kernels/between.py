"""What stands between two layers on the kernels, computed in their tiles: a pass over graphs.

A layer takes and returns tiles, and all else has features last, so that activations are transposed
on either side of it. Where nothing but pointwise operations stands between (a bias, an activation,
the derivative of one), they need not be.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from topkast_func.kernels.tiles import TRANSPOSED

_ATEN = torch.ops.aten
_SUM, _RESHAPE, _FULL = _ATEN.sum.dim_IntList, _ATEN.reshape.default, _ATEN.full.default
_COPIES = (_RESHAPE, _ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.clone.default)


class StayInTiles(CustomGraphPass):
    """Computes in tiles what follows from tiles alone, and becomes tiles or sums over rows."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph.

        Args:
            graph: Of pure operators of ATen; each node tells its value in ``meta["val"]``.
        """
        spans = {end: span for end in graph.nodes if (span := _span(end))}
        while leaking := _leaking(spans):
            spans = {end: span for end, span in spans.items() if not leaking & span}
        inside = {node for span in spans.values() for node in span}
        tiles: dict[Node, Node] = {}
        ends: dict[Node, Node] = {}
        for node in list(graph.nodes):
            with graph.inserting_before(node):
                if node in inside:
                    tiles[node] = _in_tiles(graph, node, tiles)
                if node in spans:
                    ends[node] = _end(graph, node, tiles[_given(node)])
        for end, made in ends.items():  # only now: what is in tiles may read other ends
            end.replace_all_uses_with(made)
        graph.eliminate_dead_code()

    def uuid(self) -> bytes:
        """Return what is another with another pass: torch keeps graphs on disk."""
        return get_hash_for_files((__file__,))


def _given(node: Node) -> Any:
    """Return the first argument of a node."""
    return node.args[0]


def _shape(node: Node) -> tuple[int, ...] | None:
    """Return the shape of a tensor; None of anything else, and where sizes are symbols."""
    value: Any = node.meta.get("val")
    known = isinstance(value, Tensor) and all(isinstance(n, int) for n in value.shape)
    return tuple(value.shape) if known else None


def _span(end: Node) -> set[Node]:
    """Return the nodes from tiles to an end, if it is made of nothing else."""
    if end.target is not TRANSPOSED and not _sums_rows(end):
        return set()
    span: set[Node] = set()
    shapes = {_shape(_given(end))} if end.target is TRANSPOSED else set()
    waiting = [_given(end)]
    while waiting:
        node = waiting.pop()
        if node in span:
            continue
        span.add(node)
        if node.target is TRANSPOSED:
            shapes.add(_shape(node))
        elif sources := _sources(node):
            waiting += sources
        else:
            return set()
    return span if len(shapes) == 1 else set()


def _sums_rows(node: Node) -> bool:
    """Return whether a node sums a tensor over all axes but the last."""
    if node.target is not _SUM or (shape := _shape(_given(node))) is None:
        return False
    summed: Any = node.args[1] or ()
    return {axis % len(shape) for axis in summed} == {*range(len(shape) - 1)}


def _sources(node: Node) -> list[Node]:
    """Return what a node is computed from, number by number; nothing if that is not all of it."""
    if (shape := _shape(node)) is None:
        return []
    if node.target in _COPIES:
        source = _given(node)
        return [source] if (_shape(source) or ())[-1:] == shape[-1:] else []
    if not isinstance(node.target, OpOverload) or torch.Tag.pointwise not in node.target.tags:
        return []
    given = [source for source in node.all_input_nodes if source.target is not _FULL]
    sources = {source: _shape(source) for source in given}
    if not {*sources.values()} <= {shape, shape[-1:], ()}:
        return []
    return [source for source, own in sources.items() if own == shape]


def _leaking(spans: Mapping[Node, set[Node]]) -> set[Node]:
    """Return the nodes of spans that others read, with features last."""
    inside = set(spans).union(*spans.values())
    return {n for span in spans.values() for n in span if not inside.issuperset(n.users)}


def _in_tiles(graph: Graph, node: Node, tiles: Mapping[Node, Node]) -> Node:
    """Return in tiles what a node of a span has with features last."""
    compute: Any = node.target
    if compute is TRANSPOSED:
        return _given(node)
    if compute in _COPIES:
        return tiles[_given(node)]

    def operand(source: Node) -> Node:
        shape = _shape(source)
        if source.target is _FULL and shape:  # a number without axes widens no dtype
            return graph.call_function(_FULL, ([1, 1, 1], source.args[1]), source.kwargs)
        if shape and len(shape) == 1:
            return graph.call_function(_RESHAPE, (source, [-1, 1]))
        return tiles.get(source, source)

    return graph.call_function(compute, *map_arg((node.args, node.kwargs), operand))


def _end(graph: Graph, end: Node, tiles: Node) -> Node:
    """Return what an end is, made of tiles."""
    if end.target is TRANSPOSED:
        return tiles
    sums = graph.call_function(_SUM, (tiles, [0, 2]), end.kwargs)
    return graph.call_function(_RESHAPE, (sums, [*(_shape(end) or ())]))
