"""Sparse training by Lightning, an optional extra."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from types import MethodType
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from topkast_func.facade.alpha import SETS, alpha
from topkast_func.facade.sparse_layer import ForwardPass
from topkast_func.integrations.host import Hosted
from topkast_func.powerprop import theta_of

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as reason:
    raise ImportError(f"no Lightning ({reason}): pip install 'topkast_func[lightning]'") from reason

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
"""What Lightning calls in place of the forward pass of a module."""


WRAPPED = "_topkast_func_wrapped"
"""What marks a step that a callback has wrapped, which another one of the trainer is not to."""


class TopKastCallback(Hosted, Callback):
    """Lets `lightning.Trainer` train a module that `sparsify` has made sparse, or a part of it.

    It adds the gradient of the penalty, chooses the sets anew when that is due, and at the end of
    ``fit`` leaves a plain module that holds α; ``save_checkpoint`` then writes that, and
    ``test(ckpt_path="best")`` and its like load the α of a checkpoint that holds θ.

    A checkpoint of a run in progress holds θ, the sets (``…_sets``) and the number of the step,
    and is no plain module. To go on bit for bit, sparsify the module again with the same
    configuration, then ``fit(…, ckpt_path=…)``. To make a plain module of it::

        tk.sparsify(module, config)
        module.load_state_dict(torch.load(path)["state_dict"])
        tk.densify(module)

    Strategies that train in processes of their own, ``ddp_spawn``, ``ddp_fork`` and
    ``ddp_notebook``, hand α back to a module that stays sparse here: call `densify` after ``fit``.

    The gradient of the penalty is added to that of the batches before Lightning clips it, so that
    no ``training_step`` has to be changed; the loss that it returns is without the penalty. Where
    the module steps its optimisers itself, it is added within their steps, after what the module
    clips. Within a step of the module ``layer.weight`` reads as α, to the end of it: what clips or
    clamps weights there, after a step of the optimiser by hand, is to take them from
    ``parameters()``.

    `lightning.pytorch.tuner.Tuner.lr_find` runs none of the trainer's callbacks: without penalty
    and refreshes, of which a warning may say that nobody counts the steps.

    Args:
        sparsifier: What `sparsify` returned.
        densify_at_end: Whether the module becomes plain at the end. Without, it can be trained on.
        name: What tells it from another of the same trainer, of a part that was sparsified by
            itself; to resume, the same again.

    Raises:
        TypeError: The first argument is no sparsifier, or the name no text.
    """

    _stepping: tuple[Optimizer, ...] = ()
    """The optimisers that have begun a step that is not counted yet."""

    _stepped: tuple[Optimizer, ...] = ()
    """Those that have ended one since the last count."""

    _noting: tuple[RemovableHandle, ...] = ()
    """What notes the end of steps."""

    _loads: RemovableHandle | None = None
    """Turns what is loaded to be evaluated into what a plain module holds."""

    _own: tuple[tuple[str, Any], ...] = ()
    """The steps that were wrapped, with what the module itself had in their place."""

    _late = False
    """Whether a checkpoint under way holds the sets of before the last count."""

    @property
    def state_key(self) -> str:
        """What a checkpoint calls the callback."""
        return self._generate_state_key(name=self.name) if self.name else super().state_key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let sparse weights that a step of the module reads, or it loads to be plain, be α."""
        plain = [name for name in STEPS if not hasattr(getattr(pl_module, name), WRAPPED)]
        self._own = tuple((name, vars(pl_module).get(name)) for name in plain)
        for name in plain:
            setattr(pl_module, name, _forward_pass(getattr(pl_module, name)))
        if stage != "fit":
            turn = partial(_to_alpha, self.sparsifier.config.powerprop)
            self._loads = pl_module.register_load_state_dict_pre_hook(turn)  # type: ignore[no-untyped-call]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module and its optimisers as they were."""
        for handle in self._noting:
            handle.remove()
        if self._loads is not None:
            self._loads.remove()
        for name, step in self._own:
            delattr(pl_module, name)
            vars(pl_module).update({} if step is None else {name: step})
        self._noting, self._loads, self._own = (), None, ()
        self._stepping = self._stepped = ()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Do what `teardown` does, which an exception leaves out."""
        self.teardown(trainer, pl_module, "")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the sparse module is trained, and note from now on where a step ends."""
        self._begin(pl_module, trainer.optimizers)
        self._check_alone(trainer.callbacks)  # type: ignore[attr-defined]
        self._noting = tuple(o.register_step_post_hook(self._note) for o in trainer.optimizers)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradient of the penalty; who steps twice in a batch is counted twice.

        An optimiser that has its loss computed several times in a step comes here as often, and one
        without a gradient, where the module has left the batch out, makes no step.
        """
        with _as_trained(pl_module):
            if optimizer in self._stepped:
                self.on_train_batch_end()
            held = (p for group in optimizer.param_groups for p in group["params"])
            if any(p.grad is not None for p in held) and self.sparsifier.penalize(optimizer):
                self._stepping = (*self._stepping, optimizer)

    def on_train_batch_end(self, *_: Any) -> None:
        """Count the step, if one was made, and choose the sets anew where that is due."""
        made, self._stepping, self._stepped = self._stepping, (), ()
        if made:
            self.sparsifier.step()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a plain module."""
        self._end()

    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepped = (*self._stepped, optimizer)

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps; see `Sparsifier.state_dict`.

        Who saves at the end of a batch before this callback has seen it lets it count the step.
        """
        if self._stepping and self._stepped:
            self.on_train_batch_end()
            self._late = True
        return self.sparsifier.state_dict()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the sets that go with the count into the checkpoint."""
        if self._late:
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        self._late = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self.sparsifier.load_state_dict(state_dict)


def _to_alpha(
    exponent: float, module: LightningModule, entries: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Turn the entries of sparse weights into α where the module has plain ones, in place."""
    held = dict(module.named_buffers())
    for buffer in [key for key in entries if key.endswith(SETS) and key not in held]:
        key = buffer.removesuffix(SETS)
        entries[key] = alpha(theta_of(entries[key], exponent), entries.pop(buffer))


@contextmanager
def _as_trained(module: LightningModule) -> Iterator[None]:
    """Let weights that `toggle_optimizer` has frozen for the moment require a gradient.

    Yields:
        Nothing.
    """
    toggled = [
        (parameter, parameter.requires_grad, trained)
        for parameter, trained in getattr(module, "_param_requires_grad_state", {}).items()
    ]
    for parameter, _, trained in toggled:
        parameter.requires_grad = trained
    try:
        yield
    finally:
        for parameter, now, _ in toggled:
            parameter.requires_grad = now


def _forward_pass(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a step, bound as it is: `copy.deepcopy` of the module binds that of the copy to it.

    Lightning reads what arguments a step has one level below a decorator, and no deeper.

    Returns:
        The step.
    """
    function = step.__func__ if isinstance(step, MethodType) else step

    @wraps(function)
    def run(*inputs: Any, **options: Any) -> Any:
        with ForwardPass():
            return function(*inputs, **options)

    vars(run).update({WRAPPED: True, "__wrapped__": getattr(step, "__wrapped__", step)})
    return MethodType(run, step.__self__) if isinstance(step, MethodType) else run
