"""What must agree: sets with the configuration that is to go on from them."""

from collections.abc import Mapping

from topkast_func.config import TopKastConfig
from topkast_func.masks import counts, is_of_blocks
from topkast_func.model.forward import check_weight_sets
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
