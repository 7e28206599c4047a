"""What must agree: the sets of a state with the configuration that is to go on from them."""

from collections.abc import Mapping, Sequence

from topkast_func.config import TopKastConfig
from topkast_func.kernels.pattern import block_of
from topkast_func.masks import counts, counts_among, is_of_blocks
from topkast_func.model.forward import check_weight_sets
from topkast_func.storage.compact import CompactWeights
from topkast_func.storage.dense import DenseWeights
from topkast_func.types import Masks, Params


def check_masks(params: Params, masks: Mapping[str, Masks], config: TopKastConfig) -> None:
    """Check that sets are those that a configuration could have chosen at the start.

    Args:
        params: Weights by name.
        masks: Sets by name.
        config: The configuration.

    Raises:
        TypeError: The sets are not `Masks` of bool.
        ValueError: They are of other parameters, of other shapes or sizes, not made of whole
            blocks, or A is not part of B.
    """
    asked = counts(params, config)
    if masks.keys() != asked.keys():
        missing, unknown = sorted(asked.keys() - masks.keys()), sorted(masks.keys() - asked.keys())
        raise ValueError(
            f"masks must be those of the sparse parameters: missing {missing}, unknown {unknown}; "
            "sparse= and keep_dense= say which are sparse"
        )
    for name, expected in asked.items():
        sets = masks[name]
        check_weight_sets(name, sets, params[name].shape)
        if (sets.forward & ~sets.backward).any():
            raise ValueError(f"masks[{name!r}]: the forward mask is not part of the backward mask")
        if not all(is_of_blocks(mask, config.block_shape) for mask in sets):
            raise ValueError(f"masks[{name!r}] are not made of blocks of {config.block_shape}")
        found = tuple(int(mask.sum()) for mask in sets)
        if found != expected:
            raise ValueError(
                f"masks[{name!r}] have {found} entries in A and B, the configuration asks for "
                f"{expected}: give densities of their own by allocation={{pattern: density}}"
            )


def check_method(names: Sequence[str], config: TopKastConfig) -> None:
    """Check that a configuration that goes on from sparse parameters keeps them sparse.

    Args:
        names: Names of the sparse parameters.
        config: The configuration.

    Raises:
        ValueError: Its method is to train densely.
    """
    if names and not config.method.sparsifies:
        raise ValueError(
            f"method={config.method} chooses no sets, and the state is sparse: begin dense "
            "training with init_state, from a module that has loaded dense_params(state)"
        )


def check_blocks_agree(weights: CompactWeights | DenseWeights, config: TopKastConfig) -> None:
    """Check that the values of the layers on the kernels are in the blocks of a configuration.

    Args:
        weights: The weights of a state.
        config: The configuration.

    Raises:
        ValueError: They are in blocks of another shape.
    """
    values = weights.values()
    for name in weights.layers():
        if (found := block_of(values[name])) != config.block_shape:
            raise ValueError(
                f"the state has {name!r} in blocks of {found}, the configuration asks for "
                f"{config.block_shape}: begin anew with init_state"
            )


def is_of_stage(weights: CompactWeights | DenseWeights, config: TopKastConfig, step: int) -> bool:
    """Return whether sets have the sizes that a configuration asks for at a step."""
    shapes = {name: weights.shapes()[name] for name in weights.sparse()}
    return weights.sizes() == counts_among(shapes, config, step)


def check_sets(weights: CompactWeights | DenseWeights, config: TopKastConfig, step: int) -> None:
    """Check that sets are those of a configuration at a step, in their names and sizes.

    Args:
        weights: The weights of a state.
        config: The configuration.
        step: Number of the step that comes next; a refresh that is due before it may be due still.

    Raises:
        ValueError: They are not; it names both sides.
    """
    names = weights.sparse()
    check_method(names, config)
    check_blocks_agree(weights, config)
    shapes = {name: weights.shapes()[name] for name in names}
    found = weights.sizes()
    asked = [counts_among(shapes, config, t) for t in (step, max(step - 1, 0))]
    for name, sizes in found.items():
        expected = [counts[name] for counts in asked]
        if sizes not in expected:
            raise ValueError(
                f"the state has {sizes} entries of {name!r} in A and B, the configuration asks for "
                f"{expected[0]} at step {step}: to go on with other sparsities, call "
                "refresh(state, config) first"
            )
