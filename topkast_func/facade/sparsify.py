"""Any module made sparse in place, for ordinary loops with any optimiser of `torch.optim`."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, distributed, nn

from topkast_func.checks import check_count
from topkast_func.config import TopKastConfig, allocate
from topkast_func.config.allocation import shared_among_all
from topkast_func.facade.derived import readable
from topkast_func.facade.guard import release, steps_made
from topkast_func.facade.rule import Rule
from topkast_func.facade.sparse_layer import SparseLayer, make_sparse, on_kernels, sparse_class
from topkast_func.facade.sparse_weight import SparseWeight, weights_of
from topkast_func.kernels.engines import EngineName, check_engine
from topkast_func.masks import compute_masks, counts
from topkast_func.model.modules import trainable
from topkast_func.ranking import NaNParameterError
from topkast_func.report.summary import Row, Summary
from topkast_func.sparsity import Allocation
from topkast_func.training.agreement import check_masks
from topkast_func.training.loss import exploration_penalty
from topkast_func.training.state import check_ties, chosen_anew
from topkast_func.types import Masks, Params, Tensors

Module = TypeVar("Module", bound=nn.Module)

Owners: TypeAlias = dict[str, list[tuple[nn.Module, SparseWeight]]]
"""By name of a sparse weight the layers that have it: several where it is tied."""

WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch._dynamo.OptimizedModule,
    torch.fx.GraphModule,
    torch.jit.ScriptModule,
)
"""Modules made of others, which are to be sparsified before."""


class Sparsifier:
    """Keeps the schedule of a module that `sparsify` has made sparse.

    The module holds all else: θ in its parameters, A and B in its buffers.

    Args:
        model: The module.
        config: The configuration.
        seed: Seed of the methods that draw.

    Attributes:
        model: The module.
        config: The configuration.
        seed: The seed.
        steps: Number t of the step that comes next, from 0.
    """

    def __init__(self, model: nn.Module, config: TopKastConfig, seed: int = 0) -> None:
        self.model, self.config, self.seed, self.steps = model, config, seed, 0
        self._reached, self._optimized, self._others = False, 0, steps_made()
        for theta in self._theta().values():
            theta.register_post_accumulate_grad_hook(self._note_backward)  # type: ignore[no-untyped-call]
        if config.schedule.refreshes_at(0):
            self.refresh()
        self._ask_for_gradients()

    def step(self) -> bool:
        """Count a step of the optimiser, and choose the sets anew where that is due.

        To be called once after each ``optimizer.step()``. Where θ holds NaN the sets stay, and a
        warning says so.

        Returns:
            Whether the sets were chosen anew.

        Raises:
            RuntimeError: No backward pass has reached the sparse weights since the last call, the
                optimiser that made a step has none of them, or the model is dense again; nothing
                has changed.
        """
        self._check_stepped()
        self.steps += 1
        due = self.config.schedule.refreshes_at(self.steps)
        if due:
            try:
                self.refresh()
            except NaNParameterError as reason:
                warnings.warn(f"no refresh before step {self.steps}: {reason}", stacklevel=2)
                due = False
        self._ask_for_gradients()
        return due

    def refresh(self) -> None:
        """Choose A and B anew now, whether that is due or not.

        Raises:
            RuntimeError: The method reads the gradient at α of all entries, and there is none.
            NaNParameterError: A sparse weight holds NaN; nothing has changed.
        """
        theta = {name: parameter.detach() for name, parameter in self._theta().items()}
        chosen, masks = chosen_anew(
            theta,
            theta,
            self.masks,
            self.config,
            step=self.steps,
            seed=self.seed,
            gradients=self._gradients(),
        )
        self._follow_schedule()
        for name, owners in self._owners().items():
            if chosen[name] is not theta[name]:
                theta[name].copy_(chosen[name])
            for layer, weight in owners:
                weight.hold(layer, masks[name])

    def penalty(self) -> Tensor:
        """Return λ times the exploration penalty, 0-d, to be added to the loss."""
        theta = self._theta()
        if not theta:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        penalty = exploration_penalty(theta, self.masks(), self.config, step=self.steps)
        return self.config.penalty_weight * penalty

    def masks(self) -> dict[str, Masks]:
        """Return A and B of the sparse weights by name."""
        return {name: owner[0][1].masks(owner[0][0]) for name, owner in self._owners().items()}

    def summary(self) -> Summary:
        """Tell what the module consists of, one row for each parameter."""
        owners = {id(w.theta(m)): (m, w) for several in self._owners().values() for m, w in several}
        return Summary([
            _row(name, parameter, *owners.get(id(parameter), (None, None)))
            for name, parameter in self.model.named_parameters()
        ])

    def state_dict(self) -> dict[str, int]:
        """Return the number of the step and the seed; the rest is in the module's state dict."""
        return {"steps": self.steps, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run was; the module's state dict is to be loaded too.

        Args:
            state: What `state_dict` returned.

        Raises:
            TypeError: The values are no integers.
            ValueError: These are not the keys, or a number is out of range.
        """
        if state.keys() != {"steps", "seed"}:
            raise ValueError(f"state must have the keys 'steps' and 'seed', got {sorted(state)}")
        steps, seed = (check_count(name, state[name], 0) for name in ("steps", "seed"))
        self.steps, self.seed = steps, seed
        self._follow_schedule()
        self._ask_for_gradients()

    def _owners(self) -> Owners:
        found: Owners = {}
        for module in self.model.modules():
            for weight in weights_of(module).values():
                found.setdefault(weight.rule.name, []).append((module, weight))
        return found

    def _theta(self) -> dict[str, nn.Parameter]:
        return {name: owners[0][1].theta(owners[0][0]) for name, owners in self._owners().items()}

    def _follow_schedule(self) -> None:
        """Tell each weight at which step it is, for sets that are chosen from a loaded θ."""
        owners = self._owners()
        shapes = {name: theta.shape for name, theta in self._theta().items()}
        for name, allocation in shared_among_all(shapes, self.config, self.steps).items():
            if self.config.schedule.settled(self.steps):
                allocation = Allocation(allocation.forward, allocation.forward)
            for _, weight in owners[name]:
                weight.rule = weight.rule._replace(
                    allocation=allocation, step=self.steps, seed=self.seed
                )

    def _ask_for_gradients(self) -> None:
        """Let the next step give the gradient of every entry, if a refresh is to read it then."""
        method, by_hand = self.config.method, self.config.refresh_every is None
        asked = method.reads_gradient and (
            by_hand or self.config.schedule.refreshes_at(self.steps + 1)
        )
        for owners in self._owners().values():
            theta = owners[0][1].theta(owners[0][0])
            probe = torch.zeros_like(theta, requires_grad=True) if asked else None
            for _, weight in owners:
                weight.probe = probe

    def _gradients(self) -> Tensors | None:
        """Return the gradients that the method reads, summed over the processes."""
        if not self.config.method.reads_gradient or self.config.schedule.settled(self.steps):
            return None
        found = {}
        for name, owners in self._owners().items():
            probe = owners[0][1].probe
            if probe is None or probe.grad is None:
                raise RuntimeError(
                    f"{self.config.method} chooses by the gradient of {name!r} at α, and there is "
                    "none: a backward pass comes before; with refresh_every=None any step has it"
                )
            found[name] = probe.grad
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(found[name])
        return found

    def _note_backward(self, parameter: Tensor) -> None:
        self._reached = True

    def _check_stepped(self) -> None:
        held = self._theta()
        if not held and self.config.method.sparsifies:
            raise RuntimeError("model has no sparse weights any more: it was densified")
        theta = [p for p in held.values() if p.requires_grad]
        optimized = sum(w.steps for owners in self._owners().values() for _, w in owners)
        if theta and not self._reached and optimized == self._optimized:
            raise RuntimeError(
                "no backward pass has reached a sparse weight since the last step(): call "
                "loss.backward() and optimizer.step() first"
            )
        skipped = any(p.grad is not None and not p.grad.isfinite().all() for p in theta)
        if theta and not optimized and steps_made() > self._others and not skipped:
            raise RuntimeError(
                "the optimizer that has made a step holds none of the sparse weights: build it "
                "from model.parameters()"
            )
        self._reached, self._optimized = False, optimized


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
    made before or after, leaves what is outside B as it was, bit for bit, with slots of zero. θ,
    gradient and slots take the memory of a dense module, and a step for a moment a copy of θ;
    `train_step` needs less. Linear layers are computed by the sparse kernels where these are
    faster, all others with α at the price of the dense layer.

    A state dict of the plain module loads; the sets are then chosen from its weights. A running
    mean of the parameters (`torch.optim.swa_utils.AveragedModel`) is one of θ; copy the buffers
    of the module into it before it is used, as for BatchNorm.

    Args:
        model: The module, before it is wrapped or compiled.
        config: The configuration. Methods that read the gradient of every entry (`rigl`) get that
            of the step before a refresh.
        engine: Who computes linear layers: "auto" for the fastest, "dense" for torch itself.
        seed: Seed of the methods that draw sets, at least 0.
        masks: Sets to start from in place of those that the method would choose, see `init_state`.

    Returns:
        What is to be called after each step of the optimiser, and knows the penalty.

    Raises:
        TypeError: The model is no module, or see `init_state`.
        ValueError: The model is wrapped, sparse already, has nothing to be made sparse, or see
            `init_state`; it is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> sparsifier = sparsify(model, TopKastConfig(0.5, 0.25, keep_dense="2.*"))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> loss = model(torch.ones(4, 8)).mean() + sparsifier.penalty()
        >>> loss.backward()
        >>> optimizer.step()
        >>> sparsifier.step(), list(sparsifier.masks())
        (False, ['0.weight'])
        >>> type(densify(model)[0])
        <class 'torch.nn.modules.linear.Linear'>
    """
    check_engine(engine)
    check_count("seed", seed, 0)
    params = _checked(model, config)
    rules = _rules(params, config, engine, seed)
    if masks is not None:
        check_masks(params, masks, config)
    elif all(map(readable, params.values())):
        masks = compute_masks(params, config, seed=seed)
    plan = _plan(model, params, rules)
    for module, own in plan:
        plain: Any = type(module)
        module.__class__ = sparse_class(plain, tuple(own))
        for key, rule in own.items():
            make_sparse(module, key, rule, masks[rule.name] if masks else None)
    return Sparsifier(model, config, seed)


def densify(model: Module) -> Module:
    """Turn sparse layers back into plain ones that hold α, in place.

    Args:
        model: A module that `sparsify` made sparse, or that has layers such as `TopKastLinear`.

    Returns:
        The same module.

    Raises:
        ValueError: It has no sparse weights.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    if not any(weights_of(layer) for layer in layers):
        raise ValueError("model has no sparse weights: sparsify was never called on it")
    for layer in layers:
        release(layer)
        layer._make_plain()
    return model


def _checked(model: nn.Module, config: TopKastConfig) -> Params:
    """Return the parameters of a module that can be made sparse, by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if config.powerprop != 1.0:
        raise ValueError("powerprop trains φ in place of θ: use make_train_step")
    for path, module in model.named_modules():
        if weights_of(module):
            raise ValueError(f"{path or 'model'!r} has sparse weights already: densify it first")
        if isinstance(module, WRAPPERS) or "forward" in vars(module):
            raise ValueError(
                f"{path or 'model'!r} is wrapped, traced or compiled, or its forward pass has been "
                "replaced: sparsify the module before that"
            )
    params = trainable(model)
    if not params:
        raise ValueError("model has no parameter that requires a gradient")
    if lazy := [name for name, p in params.items() if nn.parameter.is_lazy(p)]:
        raise ValueError(f"{lazy} have no shape yet: run the model once first")
    check_ties(model, config)
    return params


def _rules(params: Params, config: TopKastConfig, engine: EngineName, seed: int) -> dict[str, Rule]:
    ends = () if config.explore_until is None else (config.explore_until,)
    stages = [counts(params, config, step=step) for step in (0, *config.schedule.starts, *ends)]
    alone = replace(config, sparse=None, keep_dense=())
    return {
        name: Rule(
            name,
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
    plan = []
    for module in model.modules():
        own = {key: found[id(p)] for key, p in module._parameters.items() if id(p) in found}
        if "weight" in own and on_kernels(type(module)):
            own["weight"] = rule = own["weight"]._replace(matrix=True)
            rule.choice(params[rule.name], *next(iter(rule.counts)))
        if any(id(parameter) in found for parameter in module.parameters()):
            plan.append((module, own))
    return plan


def _row(
    name: str, parameter: nn.Parameter, layer: nn.Module | None, weight: SparseWeight | None
) -> Row:
    size, engine, reason = parameter.numel(), "torch", "left dense"
    forward, backward, stored = size, size if parameter.requires_grad else 0, parameter.nbytes
    if layer is not None and weight is not None:
        masks = weight.masks(layer)
        forward, backward = int(masks.forward.sum()), int(masks.backward.sum())
        engine, reason = weight.choice(layer)
        stored += weight.sets(layer).nbytes
    return Row(
        name=name,
        shape=tuple(parameter.shape),
        forward=forward,
        backward=backward,
        forward_density=forward / size,
        backward_density=backward / size,
        engine=engine,
        reason=reason,
        bytes=stored,
    )
