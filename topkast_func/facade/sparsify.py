"""Any module made sparse in place, for ordinary loops with any optimiser of `torch.optim`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from topkast_func.checks import check_count, check_type
from topkast_func.config import TopKastConfig, allocate
from topkast_func.config.selection import warn_of_other_names
from topkast_func.facade.classes import sparse_class
from topkast_func.facade.owners import first, owners_in
from topkast_func.facade.replaced import check_nested
from topkast_func.facade.rule import Rule
from topkast_func.facade.sparse_layer import SparseLayer, become, make_sparse
from topkast_func.facade.sparsifier import Sparsifier
from topkast_func.facade.watched import watched
from topkast_func.kernels.engines import EngineName, check_engine
from topkast_func.kernels.pattern import is_indexed
from topkast_func.masks import compute_masks, counts
from topkast_func.model.layers import stand_ins
from topkast_func.model.modules import trainable
from topkast_func.reading import check_numbers, readable
from topkast_func.training.fits_config import check_masks
from topkast_func.training.start import check_ties
from topkast_func.types import Masks, Params

WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.fx.GraphModule,
    torch.jit.ScriptModule,
)
"""Modules made of others, which are to be sparsified before."""


@torch.inference_mode(False)
def sparsify(
    model: nn.Module,
    config: TopKastConfig,
    *,
    engine: EngineName = "auto",
    seed: int = 0,
    masks: Mapping[str, Masks] | None = None,
) -> Sparsifier:
    """Make the selected parameters of a module sparse, in place.

    The module stays what it is: its parameters, the keys of its state dict and its classes
    (``isinstance``). A sparse weight is still the parameter that holds θ, dense; beside it stands
    a buffer ``<name>_sets`` of the bits of A and B, [2, ⌈n/8⌉]. The forward pass computes with
    α = θ·1_A, the gradient is that at α, kept on B, and a step of any optimiser of `torch.optim`,
    made before or after, leaves what is outside B as it was, bit for bit, with slots as they begin
    (but for ``SparseAdam``, which takes no dense gradients: that of an embedding with
    ``sparse=True`` is dense here too). θ, gradient and slots take the memory of a dense module, and
    a step that of a copy of θ, which stays there on a CPU; `train_step` needs less. Linear layers,
    and the projections of attention where a batch attends to itself, are computed by the sparse
    kernels where these are faster, all others with α at the price of the dense layer.

    The attribute of a sparse weight reads as α while the module's ``forward`` runs, and in a
    backward pass; at any other time as θ. That goes for methods called from outside
    (``model.encode(x)``: call it from ``forward``, or after `densify`) and for threads that a
    forward pass starts. What it writes to a sparse weight goes to α and is lost: constrain θ after
    the step of the optimiser; what is written there stays, outside B too, whoever writes it.

    With ``powerprop`` the parameter holds φ in place of θ: weights that are given here, or loaded
    from a state dict without sets, which is one of the plain module, are turned into φ, and
    `densify` turns them back.

    A state dict of the plain module loads; the sets are then chosen from its weights. Weights that
    are written to in another way, initialised anew say, keep their sets until the next refresh:
    call `Sparsifier.refresh`. A running mean of the parameters by
    `torch.optim.swa_utils.AveragedModel` is made of the sparse module, and is one of θ, or of φ,
    with the sets of the module at its last update; one of buffers too is not, and its forward pass
    says so. A copy that is moved by hand, such as a target network, takes the buffers over too.
    Under `torch.nn.parallel.DistributedDataParallel` the sets go along with the buffers that it
    broadcasts by default: leave it at that, and let all ranks call `Sparsifier.step`.

    Args:
        model: The module, before it is wrapped or compiled.
        config: The configuration. Methods that read the gradient of every entry (`rigl`) get that
            of the step before a refresh, summed over the processes of that wrapper, or of all.
        engine: Who computes linear layers and convolutions: "auto" for the fastest, "dense" for
            torch itself.
        seed: Seed of the methods that draw sets, at least 0.
        masks: Sets to start from in place of those that the method would choose, see `init_state`.

    Returns:
        What is to be called after each step of the optimiser, and knows the penalty.

    Raises:
        TypeError: The model is no module, ``config`` no configuration, or see `init_state`.
        ValueError: The model is wrapped, sparse already, has nothing to be trained or a weight of
            another that is sparse, a layer has something of the name ``<name>_sets`` or an
            embedding ``max_norm``, ``powerprop`` has nothing to train, or see `init_state`. After
            any error it is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> sparsifier = sparsify(model, TopKastConfig(0.5, 0.25, keep_dense="2.*"))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> loss = model(torch.ones(4, 8)).mean() + sparsifier.penalty()
        >>> loss.backward()
        >>> optimizer.step()
        >>> sparsifier.step(), list(sparsifier.masks())
        (False, ['0.weight'])
    """
    check_numbers("tk.sparsify")
    check_engine(engine)
    check_count("seed", seed, 0)
    params = _checked(model, config)
    rules = _rules(params, config, engine, seed)
    if masks is not None:
        check_masks(params, masks, config)
    elif all(map(readable, params.values())):
        masks = compute_masks(params, config, seed=seed)
    plan = _plan(model, params, rules)
    check_nested(model, plan[0][1])
    warn_of_other_names(params, config)
    turned = rules if config.powerprop > 1.0 else {}
    before = {name: params[name].detach().clone() for name in turned}
    changed: list[Any] = []
    try:
        for module, own in plan:
            plain: Any = type(module)
            become(module, sparse_class(plain, tuple(own)))
            changed.append(module)
            for key, rule in own.items():
                make_sparse(module, key, rule, masks[rule.name] if masks else None)
        for layer, weight in first(owners_in(model)).values():
            weight.begin(layer)
        return Sparsifier(model, config, seed)
    except BaseException:
        for name, theta in before.items():
            params[name].detach().copy_(theta)
        for module in changed:
            module._leave()
        raise


def _checked(model: nn.Module, config: TopKastConfig) -> Params:
    """Return the parameters of a module that can be made sparse, by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_type("config", config, TopKastConfig)
    for path, module in model.named_modules():
        if isinstance(module, SparseLayer):
            raise ValueError(f"{path or 'model'!r} was made sparse already: densify it first")
        if (
            isinstance(module, WRAPPERS)
            or "_orig_mod" in module._modules
            or "forward" in vars(module)
        ):
            raise ValueError(
                f"{path or 'model'!r} is wrapped, traced or compiled, or its forward pass has been "
                "replaced: sparsify the module before that"
            )
    params = trainable(model)
    if config.powerprop > 1.0 and not config.method.sparsifies:
        raise ValueError(f"{config.method} has no sparse weights, whose φ powerprop could train")
    if config.powerprop > 1.0 and not all(map(readable, params.values())):
        raise ValueError(
            "powerprop turns weights into φ, for which their numbers are needed: initialise or "
            "load them before tk.sparsify"
        )
    if not params:
        raise ValueError("model has no parameter that requires a gradient")
    if lazy := [name for name, p in params.items() if nn.parameter.is_lazy(p)]:
        raise ValueError(f"{lazy} have no shape yet: run the model once first")
    check_ties(model, config)
    elsewhere = watched()
    if shared := [name for name, p in params.items() if id(p) in elsewhere]:
        raise ValueError(
            f"{shared} are sparse weights of another model that was sparsified: give this one "
            "parameters of its own, densify that one first, or sparsify a module that has both"
        )
    return params


def _rules(params: Params, config: TopKastConfig, engine: EngineName, seed: int) -> dict[str, Rule]:
    exploring, until = replace(config, explore_until=None), config.explore_until
    stages = [counts(params, exploring, step=step) for step in (0, *config.schedule.starts)]
    stages += [] if until is None else [counts(params, config, step=until)]
    alone = replace(config, sparse=None, keep_dense=())
    return {
        name: Rule(
            name,
            tuple(params[name].shape),
            alone,
            allocation,
            frozenset(stage[name] for stage in stages),
            seed=seed,
            engine=engine,
        )
        for name, allocation in allocate(params, config).items()
    }


def _plan(
    model: nn.Module, params: Params, rules: Mapping[str, Rule]
) -> list[tuple[nn.Module, dict[str, Rule]]]:
    """Return the modules to be changed, with the rules of the weights of their own."""
    found = {id(params[name]): rule for name, rule in rules.items()}
    multiplied = {place for part in stand_ins(model) for place in part.places()}
    plan = []
    for module in model.modules():
        own = {key: found[id(p)] for key, p in module._parameters.items() if id(p) in found}
        for key, rule in own.items():
            block = rule.config.block_shape
            if (module, key) in multiplied and is_indexed(params[rule.name].shape, block):
                own[key] = rule._replace(matrix=True)
                own[key].choice(params[rule.name], *next(iter(rule.counts)))
        if module is model or any(id(p) in found for p in module.parameters()):
            plan.append((module, own))
    return plan
