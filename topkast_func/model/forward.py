"""The sparse forward pass: any model at α = θ·1_A, with a gradient that reaches B."""

from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from topkast_func.block_masks import is_of_blocks
from topkast_func.checks import check_block_shape, check_callable
from topkast_func.config.leaves import check_leaf, check_present
from topkast_func.kernels.pattern import (
    Pattern,
    gathered,
    is_indexed,
    pattern_of,
    places_in,
)
from topkast_func.model.alone import alone_with, may_draw, uncompiled
from topkast_func.model.alpha import alpha_when_read, straight_through
from topkast_func.model.layers import bound_to, kernel_weights, stand_ins, standing_in
from topkast_func.model.modules import bind, buffers, check_names, frozen, tensors_of, ties
from topkast_func.trees import check_mask_pair, check_named, check_shape, check_tensor
from topkast_func.types import Masks, Model, Params


class Indexed(NamedTuple):
    """A and B of a weight, indexed for the kernels.

    Attributes:
        pattern: The two disjoint sets, over blocks.
        shape: Of the weight.
        places: Where the values of B stand in the flat θ, A first: [|B|] or [blocks, r, c].
    """

    pattern: Pattern
    shape: tuple[int, ...]
    places: Tensor

    def split(self, theta: Tensor) -> Tensor:
        """Gather the values of B from θ, A first: [|B|] or [blocks, r, c]."""
        return gathered(theta, self.places)

    def active(self) -> "Indexed":
        """Return the sets for a pass without a gradient, which reads the values of A alone."""
        return self._replace(places=self.places[: self.pattern.active_count])


AnySets: TypeAlias = Masks | Indexed
"""A and B of a weight."""

Result = TypeVar("Result")


def sparse_forward(
    model: Model, params: Params, masks: Mapping[str, AnySets], *inputs: Any, **options: Any
) -> Any:
    """Run a model at its forward weights α = θ·1_A.

    The gradient with respect to θ is that of the loss at α, kept on B and zero elsewhere
    (Top-KAST, NeurIPS 2020, section 2.2); the gradient with respect to the inputs sees A
    only. Works under `torch.compile`, ``.backward()`` and the transforms of `torch.func`: `grad`,
    `vmap`, forward mode and derivatives of any order, which follow the same rule.

    Args:
        model: A module, or a pure function ``apply(params, *inputs, **options)``. A module is
            after the call what it was, its buffers too. Threads that share one take turns; where
            you compile the call yourself, one thread at a time may make it.
        params: θ by name; for a module, all its trainable parameters, and any of its frozen
            parameters and buffers, which otherwise are the module's own.
        masks: Sets by name, as masks or as `index_masks` returns them; parameters without are
            dense. Layers whose sets are indexed run on the kernels. Each call gathers
            their values from θ, which for a few rows takes longer than the product: for a
            trained model take `sparse_module`.
        *inputs: Inputs of the model.
        **options: Keyword inputs of the model.

    Returns:
        Whatever the model returns.

    Raises:
        ValueError: A parameter of the module is missing or has another shape, a name is unknown
            to the module, masks belong to no parameter or have another shape or device, or the
            model fails and its parameters are of several dtypes, layouts or devices.
        TypeError: ``model`` is not callable, ``params`` are not tensors by name, those with masks
            not dense ones of floating-point numbers, or masks are neither `Masks` of bool nor
            indexed.

    Example:
        >>> theta = {"weight": torch.tensor([[3.0, 1.0]])}
        >>> masks = {"weight": Masks(torch.tensor([[True, False]]), torch.tensor([[True, True]]))}
        >>> sparse_forward(lambda p, x: x @ p["weight"].T, theta, masks, torch.ones(1, 2))
        tensor([[3.]])
    """
    return run_at_alpha(model, params, masks, lambda apply: apply(*inputs, **options))


def run_at_alpha(
    model: Model,
    params: Params,
    masks: Mapping[str, AnySets],
    use: Callable[[Callable[..., Any]], Result],
) -> Result:
    """Use a model bound to α, in turn; where Dynamo traces it, as it is.

    Args:
        model: A module or a pure function.
        params: θ by name.
        masks: Sets by name, as masks or indexed.
        use: From the bound model to the result.

    Returns:
        What ``use`` returns.

    Raises:
        TypeError: See `sparse_forward`.
        ValueError: See `sparse_forward`.
        RuntimeError: The model raises one that the kinds of its parameters do not explain.
    """
    model = uncompiled(model)

    def run() -> Result:
        check_sets(model, params, masks)
        return use(at_alpha(model, params, masks))

    if torch.compiler.is_dynamo_compiling():
        return run()
    try:
        return alone_with(model, run, may_draw(model))
    except RuntimeError as reason:
        problem = _several_kinds(model, params)
        if problem is None or isinstance(reason, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{problem}: give tensors of one kind. It fails with {reason}") from reason


def at_alpha(model: Model, params: Params, masks: Mapping[str, AnySets]) -> Callable[..., Any]:
    """Return the model bound to α, with the gradient of the identity on B.

    Args:
        model: A module or a pure function.
        params: θ by name.
        masks: Sets by name, as masks or indexed.

    Returns:
        ``apply(*inputs, **options)``.
    """
    if not torch.is_grad_enabled():
        masks = {n: s.active() if isinstance(s, Indexed) else s for n, s in masks.items()}
    indexed = {name: sets for name, sets in masks.items() if isinstance(sets, Indexed)}
    patterns = {name: sets.pattern for name, sets in indexed.items()}
    values = {name: sets.split(params[name]) for name, sets in indexed.items()}
    weights = {n: _weight(theta, masks.get(n), values.get(n)) for n, theta in params.items()}
    lending = [s for s in stand_ins(model) if s.needed(patterns)] if patterns else []
    apply = bind(model, ties(model), weights, frozen(model), buffers(model, params))

    def lent(*inputs: Any, **options: Any) -> Any:
        with standing_in(lending), bound_to(lending, weights, values, patterns):
            return apply(*inputs, **options)

    return lent if lending else apply


def _weight(theta: Tensor, sets: AnySets | None, values: Tensor | None) -> Tensor:
    """Return α of a weight, from its values where its sets are indexed."""
    if isinstance(sets, Indexed) and values is not None:
        parts = sets.places.tensor_split([sets.pattern.active_count])
        return alpha_when_read(values, parts, theta.shape)
    return straight_through(theta, sets) if isinstance(sets, Masks) else theta


def index_masks(
    model: Model, masks: Mapping[str, Masks], block_shape: tuple[int, int] = (1, 1)
) -> dict[str, AnySets]:
    """Index the sets of layers that kernels compute, to be given in place of masks.

    `sparse_forward` and `penalized_loss` then run these layers on the kernels. The index is
    made of the contents of the masks, which `torch.func` and `torch.compile` do not see, and
    serves until the next refresh: make it once, not at each call.

    Args:
        model: The module.
        masks: Sets by name.
        block_shape: (r, c) of the blocks that the sets are made of.

    Returns:
        Indexed sets where kernels can compute the layer, masks elsewhere.

    Raises:
        TypeError: The sets are not `Masks` of bool by name, ``model`` is not callable, or
            ``block_shape`` is no pair of integers.
        ValueError: The sets are of what is no parameter or without values, or those of a layer are
            not made of such blocks or have another shape than its weight.

    Example:
        >>> model = torch.nn.Linear(8, 4, bias=False)
        >>> params = {"weight": torch.arange(32.0).reshape(4, 8)}
        >>> masks = {"weight": Masks(params["weight"] >= 24, params["weight"] >= 16)}
        >>> sets = index_masks(model, masks, block_shape=(2, 4))
        Traceback (most recent call last):
        ValueError: the sets of 'weight' are not made of blocks of (2, 4)
        >>> sets = index_masks(model, masks, block_shape=(1, 4))
        >>> sparse_forward(model, params, sets, torch.ones(1, 8))
        tensor([[  0.,   0.,   0., 220.]])
    """
    block_shape = check_block_shape("block_shape", block_shape)
    model = uncompiled(model)
    check_callable("model", model)
    check_named("masks", masks, "Masks")
    _check_known(masks, tensors_of(model) or masks)
    shapes = {
        name: shape
        for name, shape in alone_with(model, partial(kernel_weights, model)).items()
        if is_indexed(shape, block_shape)
    }
    for name, sets in masks.items():
        check_mask_pair(f"masks[{name!r}]", sets, shapes.get(name))
        for mask in sets:
            check_present(f"masks[{name!r}]", mask)
        if name in shapes and not all(is_of_blocks(mask, block_shape) for mask in sets):
            raise ValueError(f"the sets of {name!r} are not made of blocks of {block_shape}")
    return {
        name: _indexed(sets, block_shape, shapes[name]) if name in shapes else sets
        for name, sets in masks.items()
    }


def _indexed(sets: Masks, block_shape: tuple[int, int], shape: torch.Size) -> Indexed:
    pattern = pattern_of(*sets, block_shape)
    return Indexed(pattern, (*shape,), places_in(pattern, block_shape, shape))


def check_sets(model: Model, params: Params, masks: Mapping[str, AnySets]) -> None:
    """Check that parameters are those of a model and masks those of the parameters.

    Args:
        model: A module or a pure function.
        params: θ by name.
        masks: Sets by name.

    Raises:
        TypeError: See `sparse_forward`.
        ValueError: See `sparse_forward`.
    """
    check_named("params", params)
    check_names(model, params.keys())
    own = tensors_of(model)
    for name in own.keys() & params.keys():
        check_tensor(f"params[{name!r}]", params[name])
        check_shape(f"params[{name!r}]", params[name], own[name].shape, "the model")
    check_sets_of(params, masks)


def check_sets_of(params: Params, masks: Mapping[str, AnySets]) -> None:
    """Check that parameters are tensors by name and masks theirs.

    Args:
        params: θ by name.
        masks: Sets by name.

    Raises:
        TypeError: See `sparse_forward`.
        ValueError: See `sparse_forward`.
    """
    check_named("params", params)
    check_named("masks", masks, "Masks")
    _check_known(masks, params)
    for name, leaf in params.items():
        check_tensor(f"params[{name!r}]", leaf)
    for name, sets in masks.items():
        theta = params[name]
        check_leaf(f"params[{name!r}]", theta)
        check_weight_sets(name, sets, theta.shape)
        held = sets.places if isinstance(sets, Indexed) else sets.forward
        if held.device != theta.device:
            raise ValueError(f"masks[{name!r}] are on {held.device}, the parameter {theta.device}")


def check_weight_sets(name: str, sets: AnySets, shape: torch.Size) -> None:
    """Check the type and the shape of the sets of one weight.

    Args:
        name: Name of the weight, for errors.
        sets: Its sets.
        shape: Its shape.

    Raises:
        TypeError: The sets are neither `Masks` of bool nor indexed.
        ValueError: They have another shape.
    """
    if not isinstance(sets, (Masks, Indexed)):
        raise TypeError(
            f"masks[{name!r}] must be Masks, or what index_masks returns, got {type(sets).__name__}"
        )
    if isinstance(sets, Masks):
        check_mask_pair(f"masks[{name!r}]", sets, shape)
    elif sets.shape != tuple(shape):
        raise ValueError(f"masks[{name!r}] are indexed for shape {sets.shape}, not {tuple(shape)}")


def _check_known(masks: Mapping[str, object], names: Container[str]) -> None:
    if unknown := [name for name in masks if name not in names]:
        raise ValueError(f"masks of unknown parameters: {unknown}")


def _several_kinds(model: Model, params: Params) -> str | None:
    """Say which parameters differ in kind though a module has them in one, or the model is none."""
    own = tensors_of(model)
    first: dict[str, str] = {}
    for name, leaf in params.items():
        other = first.setdefault(_kind(own[name]) if name in own else "", name)
        if (kind := _kind(leaf)) != (before := _kind(params[other])):
            return f"params[{name!r}] is {kind}, and params[{other!r}] {before}"
    return None


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of {tensor.layout} on {tensor.device}"
