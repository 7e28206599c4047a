"""What a layer takes over from a state dict: θ, or φ, and its sets, or those chosen from it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from topkast_func.facade.alpha import masks_in
from topkast_func.facade.derived import counts_of
from topkast_func.facade.rule import Rule
from topkast_func.facade.sparse_weight import SparseWeight, weights_of
from topkast_func.reading import readable
from topkast_func.warn import warn_caller

POWERPROP = "powerprop"
"""What the metadata of a state dict, which torch itself keeps, tell of a sparse layer."""

UNTOLD = (
    "a state dict without sets and without the metadata that torch keeps beside the tensors does "
    "not tell whether it holds θ or φ of powerprop={}: it is taken for that of the plain module, "
    "which is θ. If it was saved from a sparse model, load it with its sets, the keys that end in "
    "'_sets', which are there with φ; if not, load it before tk.sparsify"
)


def load(
    layer: nn.Module,
    plainly: Callable[..., None],
    state_dict: dict[str, Any],
    prefix: str,
    *arguments: Any,
) -> None:
    """Load the state dict of a layer.

    Args:
        layer: The layer.
        plainly: Loads it as that of a plain one, by ``_load_from_state_dict`` of torch.
        state_dict: What has its tensors.
        prefix: What their names begin with.
        *arguments: What torch passes on.
    """
    metadata, missing, errors = arguments[0], arguments[2], arguments[4]
    found = {w: f"{prefix}{w.buffer}" for w in weights_of(layer).values()}
    told = {w: metadata.get(POWERPROP, {}).get(w.key) for w in found}
    misfits = [misfit(state_dict.get(n), told[w], w.rule, n) for w, n in found.items()]
    if any(misfits):
        errors.extend(filter(None, misfits))
        return
    before = len(errors)
    plainly(state_dict, prefix, *arguments)
    for weight, name in found.items():
        if name in missing:
            missing.remove(name)
        loaded = len(errors) == before and f"{prefix}{weight.key}" in state_dict
        if name in state_dict or not loaded or not readable(weight.raw(layer)):
            weight.look(layer)
            continue
        if weight.rule.config.powerprop > 1.0 and "version" not in metadata:
            warn_caller(UNTOLD.format(weight.rule.config.powerprop))
        try:
            assigned = metadata.get("assign_to_params_buffers", False)
            _begin(layer, weight, told[weight] or 1.0, assigned)
        except ValueError as reason:
            errors.append(f"{prefix}{weight.key}: {reason}")


def _begin(layer: nn.Module, weight: SparseWeight, held: float, assigned: bool) -> None:
    """Turn what holds θ, or φ of an exponent, into what is trained, and choose its sets."""
    if assigned and held != weight.rule.config.powerprop:
        raw = weight.raw(layer)  # whose numbers are those of the state dict's owner
        own = nn.Parameter(raw.detach().clone(), raw.requires_grad)
        layer._parameters[weight.key] = own
    weight.begin(layer, held)
    weight.choose(layer)


def misfit(bits: object, exponent: float | None, rule: Rule, name: str) -> str | None:
    """Say why what a checkpoint has is not of a weight, if it is not.

    Args:
        bits: What the checkpoint has of its sets; torch itself complains of another shape.
        exponent: That of powerpropagation; None where the checkpoint does not tell.
        rule: How the sets of the weight are chosen.
        name: Name of the bits there.

    Returns:
        The reason.
    """
    size = (2, -(-math.prod(rule.shape) // 8))
    if not isinstance(bits, Tensor) or not readable(bits) or bits.shape != size:
        return None
    if bits.dtype != torch.uint8:
        return f"{name} must be torch.uint8, got {bits.dtype}"
    if exponent not in {None, rule.config.powerprop}:
        return (
            f"the weight of {name} is of powerprop={exponent}, that of this layer of "
            f"powerprop={rule.config.powerprop}: sparsify the model as it was, or load what "
            "tk.densify leaves of that"
        )
    counts = counts_of(masks_in(bits, torch.Size(rule.shape)), rule.config)
    if counts in rule.counts:
        return None
    known = " or ".join(map(str, sorted(rule.counts)))
    block, group = rule.config.block_shape, rule.config.group
    torn = "A outside B" + (f", or groups of {group} that differ" if group else "")
    torn += f", or other blocks than {block}" if block != (1, 1) else ""
    return (
        f"{name} has |A|, |B| = {counts or torn}, this layer {known}: the checkpoint is of another "
        "sparsity; without that key the sets are chosen from its weight"
    )
