"""A trained model for inference: its sparse linear layers stored and computed sparsely."""

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from topkast_func.checks import check_count
from topkast_func.facade.densify import densify
from topkast_func.facade.derived import same
from topkast_func.facade.sparse_weight import weights_of
from topkast_func.inference.attention import SparseAttention
from topkast_func.inference.embedding import SparseEmbedding
from topkast_func.inference.linear import SparseLinear
from topkast_func.inference.pointwise import SparsePointwise
from topkast_func.inference.replaceable import replaceable
from topkast_func.inference.stored import Stored
from topkast_func.leaves import check_present
from topkast_func.model.alone import alone_with, as_plain, check_uncompiled, uncompiled
from topkast_func.model.attention import AttentionStandIn
from topkast_func.model.copies import copy_of
from topkast_func.model.layers import stand_ins
from topkast_func.model.modules import check_parameters, tensors_of
from topkast_func.model.stand_in import StandIn, TransposedStandIn
from topkast_func.training.ensembles import is_mapped, mapped
from topkast_func.training.fits_model import check_tensors
from topkast_func.training.readout import alpha_in, masks_of
from topkast_func.training.state import TrainState, check_one


def sparse_module(
    state: TrainState | nn.Module, model: nn.Module | None = None, batch_size: int = 64
) -> nn.Module:
    """Make a module for inference, with α for weights, in evaluation mode.

    Its linear layers, GPT-2's ``Conv1D`` among them, are `SparseLinear` where a cost model says
    that this is faster than a dense layer, and takes less memory. So are the projections of
    `torch.nn.MultiheadAttention`, one each for queries, keys, values and the output, and
    convolutions of one pixel. An output layer that is tied to embeddings stays one with them, and
    they look up in its stored entries. All else is as in the model: layers of a class of one's own,
    with hooks or a forward pass of their own, or that a plain list or dictionary holds as well; but
    `torch.nn.TransformerEncoder` leaves torch's fast path, on which it returns 0 wherever a padding
    mask hides the input. It has no parameter that requires a gradient. `torch.compile` and
    `torch.export` take it; what was exported needs ``import topkast_func`` before it is loaded.

    ``sparse_module(model)`` takes the model of an ordinary loop: one that `sparsify` has made
    sparse, or one that is plain again, from `densify` or from a file. Entries that are zero are
    not stored then, and no blocks are known.

    Args:
        state: The state; or, alone, a module.
        model: The module that the state was made of; it is not changed.
        batch_size: Rows of activations that a layer sees at a time, at least 1: for a sequence
            model batch times length. The cost model reads it, and how many threads torch has; any
            number can be given later. A row alone gains from threads, or where no cache holds the
            layers: at 80 % a dense one of 1024 by 1024 in the cache of one thread is as fast.

    Returns:
        A module of its own, which shares no memory with the state or the model.

    Raises:
        TypeError: ``model`` is no module, ``state`` none beside it, or ``batch_size`` no integer.
        ValueError: The state is of another model, ``batch_size`` is below 1, or a part of the
            model is compiled.
        RuntimeError: It is differentiated.

    Example:
        >>> from topkast_func import TopKastConfig, init_state, sgd
        >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2))
        >>> config = TopKastConfig(forward_sparsity=0.9, keep_dense="2.*")
        >>> sparse_module(init_state(model, config, sgd(lr=0.1)), model)
        Sequential(
          (0): SparseLinear(in_features=512, out_features=512, bias=True, density=10.0%)
          (1): ReLU()
          (2): Linear(in_features=512, out_features=2, bias=True)
        )
    """
    batch = check_count("batch_size", batch_size, 1)
    given = uncompiled(state) if model is None else as_plain(model)
    if not isinstance(given, nn.Module):
        raise TypeError(
            "model must be a torch.nn.Module, that of the state or one that sparsify has "
            f"changed, got {type(given).__name__}"
        )
    check_uncompiled(given)
    if model is None:
        stored = partial(_of_module, given)
    else:
        check_one(state)
        stored = partial(_of_state, cast(TrainState, state), given)

    def converted() -> nn.Module:
        check_parameters(given)
        return _converted(*stored(batch))

    convert = partial(alone_with, given, converted)
    return mapped(convert) if is_mapped("sparse_module", ()) else convert()


def _of_state(state: TrainState, model: nn.Module, batch: int) -> tuple[nn.Module, Stored]:
    check_tensors(state, model)
    alpha = alpha_in(state)
    plain = copy_of(model).eval().requires_grad_(requires_grad=False)
    for name, tensor in tensors_of(plain).items():
        if not same(tensor, alpha[name]):  # what is equal may be expanded, and so not written to
            tensor.copy_(alpha[name])
    masks = {name: sets.forward for name, sets in masks_of(state).items()}
    return plain, Stored(alpha, masks, state.weights.values, batch)


def _of_module(model: nn.Module, batch: int) -> tuple[nn.Module, Stored]:
    for name, parameter in model.named_parameters():
        check_present(name, parameter)
    plain = copy_of(model).eval()
    if any(map(weights_of, plain.modules())):
        densify(plain)
    alpha = dict(plain.requires_grad_(requires_grad=False).named_parameters())
    masks = {name: weight != 0 for name, weight in alpha.items() if weight.ndim > 1}
    return plain, Stored(alpha, masks, alpha, batch)


def _converted(plain: nn.Module, stored: Stored) -> nn.Module:
    names = {id(parameter): name for name, parameter in plain.named_parameters()}
    apart = _held_apart(plain)
    for layer in filter(SparsePointwise.fits, [*plain.modules()]):
        weight = layer._parameters.get("weight")
        bias: Any = layer.bias
        linear = stored.linear(names.get(id(weight)), bias)
        alone = layer not in apart and not _others(plain, layer, [weight])
        if linear is not None and alone:
            plain = _replaced(plain, layer, SparsePointwise(layer, linear))
    for part in stand_ins(plain):
        conv1d = (type(part.layer),) if isinstance(part, TransposedStandIn) else ()
        if not replaceable(part.layer, (nn.Linear, nn.MultiheadAttention, *conv1d)):
            continue
        own = [plain.get_parameter(product.name) for product in part.products]
        lookups = _others(plain, part.layer, own)
        if not all(SparseEmbedding.fits(module) and type(part) is StandIn for module in lookups):
            continue
        if not apart.isdisjoint([part.layer, *lookups]):
            continue
        if isinstance(part, AttentionStandIn):
            by = _attention(part, stored)
        else:
            by = stored.linear(part.products[0].name, part.layer.bias, transposed=part.transposed)
        if by is not None:
            plain = _replaced(plain, part.layer, by)
        if isinstance(by, SparseLinear):
            for module in lookups:
                plain = _replaced(plain, module, SparseEmbedding(by))
    return _without_fused_layers(plain)


def _others(
    model: nn.Module, layer: nn.Module, weights: Iterable[Tensor | None]
) -> list[nn.Module]:
    """Return the modules that hold weights of a layer beside the layer and its parts."""
    own, sought = {*layer.modules()}, {*map(id, weights)}
    return [
        module
        for module in model.modules()
        if module not in own and not sought.isdisjoint(map(id, module._parameters.values()))
    ]


def _held_apart(model: nn.Module) -> set[nn.Module]:
    """Return the modules that others hold in lists or attributes which torch does not know of."""
    kept = ({**vars(module), "_modules": None} for module in model.modules())
    return {leaf for leaf in tree_leaves(list(kept)) if isinstance(leaf, nn.Module)}


def _attention(part: StandIn, stored: Stored) -> nn.Module | None:
    """Return an attention whose projections are sparse where that pays; None where none is."""
    layer, (packed, out) = part.layer, (product.name for product in part.products)
    weights = layer.in_proj_weight.chunk(3)
    biases = 3 * [None] if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    thirds = [slice(i * layer.embed_dim, (i + 1) * layer.embed_dim) for i in range(3)]
    found = [stored.linear(packed, bias, rows) for bias, rows in zip(biases, thirds, strict=True)]
    found_out = stored.linear(out, layer.out_proj.bias)
    if not any(isinstance(by, SparseLinear) for by in (*found, found_out)):
        return None
    projections = [
        by or _dense(weight, bias) for by, weight, bias in zip(found, weights, biases, strict=True)
    ]
    last = found_out or _dense(layer.out_proj.weight, layer.out_proj.bias)
    return SparseAttention(layer, [*projections, last])


def _dense(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer of a copy of a weight and a bias."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    for key, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            setattr(layer, key, nn.Parameter(tensor.detach().clone(), requires_grad=False))
    return layer


def _replaced(model: nn.Module, layer: nn.Module, by: nn.Module) -> nn.Module:
    """Put a layer in the place of another, whose attributes it gets, wherever that is reached."""
    by.train(layer.training)
    vars(by).update({key: value for key, value in vars(layer).items() if key not in vars(by)})
    for module in model.modules():
        module._modules.update({key: by for key, part in module._modules.items() if part is layer})
    return by if model is layer else model


def _without_fused_layers(model: nn.Module) -> nn.Module:
    """Let transformer layers call their linear layers, whose weights they would read themselves."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model
