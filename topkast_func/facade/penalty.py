"""The exploration penalty of a sparsified module, with its weight λ."""

from torch import Tensor, nn

from topkast_func.config import TopKastConfig
from topkast_func.facade.owners import Owners, parameters_of
from topkast_func.penalty import summed_penalty, terms_of


def penalty_of(owners: Owners, model: nn.Module, config: TopKastConfig, step: int) -> Tensor:
    """Return λ times the penalty of sparse weights.

    Args:
        owners: The weights.
        model: The module that has them.
        config: Form of the penalty, its weight and densities.
        step: Number of the step.

    Returns:
        The penalty, 0-d. Where there is none it is a 0 that depends on the smallest parameter that
        is trained, so that a loss which it is all of has a gradient, of zeros.
    """
    raw = parameters_of(owners)
    shapes = {name: parameter.shape for name, parameter in raw.items()}
    device = next(iter((raw or dict(model.named_parameters())).values())).device

    def parts(name: str) -> tuple[Tensor, Tensor]:
        layer, weight = owners[name][0]
        return weight.parts(layer)

    terms = terms_of(shapes, config, step)
    penalty = config.penalty_weight * summed_penalty(terms, parts, device)
    return penalty if penalty.requires_grad else penalty + _nothing(model, penalty)


def _nothing(model: nn.Module, penalty: Tensor) -> Tensor:
    """Return a 0 that depends on a parameter, if one is trained."""
    trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    least = min(trained, key=Tensor.numel, default=penalty)
    return least.reshape(-1)[:0].sum(dtype=penalty.dtype).to(penalty.device)
