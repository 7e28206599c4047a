"""A module in Lightning, beside a loop by hand."""

import copy
import logging
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import topkast_func as tk
from tests.integrations.states import assert_same
from topkast_func.bits import unpacked
from topkast_func.integrations.lightning import TopKastCallback

CONFIG = tk.TopKastConfig(0.8, 0.5, keep_dense="head.*", refresh_every=3, penalty_weight=0.1)
EPOCHS, ACCUMULATED, BATCH, CLIP = 2, 2, 4, 0.5
STEPS = EPOCHS * 5  # ten batches an epoch
ARGUMENTS: dict[str, Any] = {
    "max_epochs": EPOCHS,
    "accumulate_grad_batches": ACCUMULATED,
    "gradient_clip_val": CLIP,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # raised by Lightning itself
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "disabled", True)


class Classifier(LightningModule):
    """A perceptron and how to train it, without a word of sparsity."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.training_step(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def loader() -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(10 * BATCH, 12, generator=draw).double()
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), BATCH)


def trainer_of(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**ARGUMENTS, **options})


def trained(
    folder: Path, config: tk.TopKastConfig = CONFIG, resume: Path | None = None
) -> tuple[Classifier, tk.Sparsifier]:
    """Train a sparse module, leave it sparse, and checkpoint it after each epoch."""
    module = classifier()
    sparsifier = tk.sparsify(module, config)
    callback = TopKastCallback(sparsifier, densify_at_end=False)
    trainer = trainer_of(folder, callback, saving(folder), enable_checkpointing=True)
    trainer.fit(module, loader(), ckpt_path=resume)
    return module, sparsifier


def saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", save_top_k=-1, enable_version_counter=False)


def by_hand(config: tk.TopKastConfig) -> tuple[Classifier, tk.Sparsifier]:
    """Train as `trained` does, with the penalty in the loss."""
    module = classifier()
    sparsifier = tk.sparsify(module, config)
    (optimizer,), (schedule,) = module.configure_optimizers()
    for _ in range(EPOCHS):
        for number, batch in enumerate(loader(), 1):
            loss = module.training_step(batch) + sparsifier.penalty()
            (loss / ACCUMULATED).backward()  # type: ignore[no-untyped-call]
            if number % ACCUMULATED == 0:
                nn.utils.clip_grad_norm_(module.parameters(), CLIP)
                optimizer.step()
                sparsifier.step()
                optimizer.zero_grad()
        schedule.step()
    return module, sparsifier


@pytest.mark.parametrize("method", [tk.topkast(), tk.rigl()])
def test_lightning_trains_as_a_loop_by_hand(method: tk.Method, tmp_path: Path) -> None:
    config = replace(CONFIG, method=method)
    module, sparsifier = trained(tmp_path, config)
    expected, handle = by_hand(config)
    start = classifier()
    told = {"steps": STEPS, "seed": 0, "powerprop": 1.0}
    assert sparsifier.state_dict() == handle.state_dict() == told
    for name, parameter in expected.named_parameters():
        moved = parameter - start.get_parameter(name)
        torch.testing.assert_close(module.get_parameter(name) - start.get_parameter(name), moved)
        assert moved.any()
    for name, masks in sparsifier.masks().items():
        assert all(map(torch.equal, masks, handle.masks()[name]))


def test_dense_training_is_counted_and_ends(tmp_path: Path) -> None:
    module = classifier()
    sparsifier = tk.sparsify(module, replace(CONFIG, method=tk.dense()))
    trainer_of(tmp_path, TopKastCallback(sparsifier)).fit(module, loader())
    assert sparsifier.steps == STEPS


@pytest.mark.parametrize("name", ["topkast", "set"])
def test_a_run_resumed_from_a_checkpoint_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = replace(CONFIG, method=getattr(tk, name)())
    whole, its = trained(tmp_path, config)
    resumed, handle = trained(tmp_path / "resumed", config, tmp_path / "step=5.ckpt")
    assert_same(resumed, whole)
    assert handle.state_dict() == its.state_dict() == {"steps": STEPS, "seed": 0, "powerprop": 1.0}


def test_what_is_saved_in_the_end_is_plain_and_a_checkpoint_is_not(tmp_path: Path) -> None:
    module, inputs = classifier(), torch.randn(5, 12).double()
    sparsifier = tk.sparsify(module, CONFIG)
    callback = TopKastCallback(sparsifier)
    trainer = trainer_of(tmp_path, callback, saving(tmp_path), enable_checkpointing=True)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    final = Classifier.load_from_checkpoint(tmp_path / "final.ckpt")
    torch.testing.assert_close(final(inputs), module(inputs))
    running = tmp_path / f"step={STEPS}.ckpt"
    state = torch.load(running, weights_only=True)["state_dict"]
    for name in ("body.0.weight", "body.2.weight"):
        inside = unpacked(state[f"{name}_sets"][0], state[name].shape)
        assert torch.equal(final.get_parameter(name), torch.where(inside, state[name], 0.0))
        assert state[name][~inside].any()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"body\.0\.weight_sets"'):
        Classifier.load_from_checkpoint(running)
    again = classifier()
    tk.sparsify(again, CONFIG)
    again.load_state_dict(state)
    torch.testing.assert_close(again(inputs), final(inputs))


@pytest.mark.parametrize("powerprop", [1.0, 2.0])
@pytest.mark.parametrize("plain", [True, False])
def test_a_checkpoint_of_the_run_is_tested_at_alpha(
    plain: bool, powerprop: float, tmp_path: Path
) -> None:
    module, config = classifier(), replace(CONFIG, powerprop=powerprop)
    callback = TopKastCallback(tk.sparsify(module, config), densify_at_end=plain)
    trainer = trainer_of(tmp_path, callback, saving(tmp_path), enable_checkpointing=True)
    trainer.fit(module, loader())
    earlier = tmp_path / f"step={STEPS // EPOCHS}.ckpt"
    trainer.test(module, loader(), ckpt_path=earlier, verbose=False)
    again = classifier()
    tk.sparsify(again, config)
    again.load_state_dict(torch.load(earlier, weights_only=True)["state_dict"])
    inputs = torch.randn(5, 12).double()
    torch.testing.assert_close(module(inputs), again(inputs))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        classifier().load_state_dict(again.state_dict())
    if plain:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            module.load_state_dict(again.state_dict())


class Adversaries(LightningModule):
    """A sparse and a dense part with an optimiser each, which take turns by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.sparse, self.dense = nn.Linear(12, 8), nn.Linear(12, 8)

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        optimizers: Any = self.optimizers()
        part, optimizer = ((self.sparse, self.dense)[number % 2], optimizers[number % 2])
        optimizer.zero_grad()
        self.manual_backward(part(batch[0]).square().mean())
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.sparse, self.dense)]


def test_a_sparse_part_is_stepped_with_its_own_optimizer(tmp_path: Path) -> None:
    module = Adversaries().double()
    sparsifier = tk.sparsify(module.sparse, tk.TopKastConfig(0.8, 0.5, refresh_every=2))
    before = copy.deepcopy(module.dense.weight)
    options: Any = {"gradient_clip_val": None, "accumulate_grad_batches": 1}
    trainer_of(tmp_path, TopKastCallback(sparsifier), **options).fit(module, loader())
    assert sparsifier.steps == EPOCHS * 5
    assert (module.dense.weight != before).all()
    assert type(module.sparse) is nn.Linear


class InOneBatch(Adversaries):
    """Both optimisers step in each batch, that of the sparse part first."""

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        for turn in range(2):
            super().training_step(batch, turn)


class Twice(Adversaries):
    """The sparse part steps twice in each batch."""

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        for _ in range(2):
            super().training_step(batch, 0)


@pytest.mark.parametrize(("kind", "interval", "steps"), [(InOneBatch, 2, 10), (Twice, 3, 20)])
def test_each_step_of_the_optimizer_of_the_sparse_part_counts(
    kind: type[Adversaries], interval: int, steps: int, tmp_path: Path
) -> None:
    module = kind().double()
    sparsifier = tk.sparsify(module.sparse, tk.TopKastConfig(0.8, 0.5, refresh_every=interval))
    options: Any = {"gradient_clip_val": None, "accumulate_grad_batches": 1}
    trainer_of(tmp_path, TopKastCallback(sparsifier), **options).fit(module, loader())
    assert sparsifier.steps == EPOCHS * steps


class Sharp(torch.optim.SGD):
    """Steps by the gradient that the loss has a little uphill (Foret and others, 2021)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        closure()
        uphill = [(p, 0.05 * p.grad) for group in self.param_groups for p in group["params"]]
        for parameter, way in uphill:
            parameter += way
        loss = closure()
        for parameter, way in uphill:
            parameter -= way
        super().step()
        return loss


def sharp(parameters: Any) -> torch.optim.Optimizer:
    return Sharp(parameters, 0.1)


def line_searching(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, max_iter=5, line_search_fn="strong_wolfe")


@pytest.mark.parametrize("make", [sharp, line_searching])
def test_a_step_that_computes_its_loss_several_times_is_one(make: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, refresh_every=3, penalty=None)
    module, expected = classifier(), classifier()
    sparsifier, handle = tk.sparsify(module, config), tk.sparsify(expected, config)
    vars(module)["configure_optimizers"] = lambda: make(module.parameters())
    options: Any = {"gradient_clip_val": None, "accumulate_grad_batches": 1, "max_epochs": 1}
    callback = TopKastCallback(sparsifier, densify_at_end=False)
    trainer_of(tmp_path, callback, **options).fit(module, loader())
    optimizer = make(expected.parameters())
    for batch in loader():

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = expected.training_step(batch)
                loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)
        handle.step()
    assert sparsifier.steps == handle.steps == 10
    for name, parameter in expected.named_parameters():
        assert torch.equal(module.get_parameter(name), parameter)


def test_parts_of_a_module_have_callbacks_of_their_own(tmp_path: Path) -> None:
    """Each with a configuration, a seed and a name; the trainer asks for keys that differ."""

    def fit(folder: Path, resume: Path | None = None) -> tuple[Classifier, list[tk.Sparsifier]]:
        module = classifier()
        parts = [module.body, module.head]
        config = replace(CONFIG, keep_dense=())
        configs = [config, replace(config, method=tk.set())]
        told = [
            tk.sparsify(p, c, seed=s) for s, (p, c) in enumerate(zip(parts, configs, strict=True))
        ]
        callbacks = [
            TopKastCallback(one, densify_at_end=False, name=f"part {i}")
            for i, one in enumerate(told)
        ]
        trainer = trainer_of(folder, *callbacks, saving(folder), enable_checkpointing=True)
        trainer.fit(module, loader(), ckpt_path=resume)
        assert not {"training_step", "validation_step"} & vars(module).keys()
        return module, told

    module, told = fit(tmp_path / "whole")
    assert [one.steps for one in told] == [STEPS, STEPS]
    saved = (tmp_path / "whole").glob("step*.ckpt")
    first = min(saved, key=lambda path: int(path.stem.split("=")[1]))
    again, resumed = fit(tmp_path / "again", first)
    assert [one.state_dict()["seed"] for one in resumed] == [0, 1]
    for name, parameter in module.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)


def test_sparse_weights_that_are_frozen_need_no_optimizer(tmp_path: Path) -> None:
    module = classifier()
    sparsifier = tk.sparsify(module, CONFIG)
    module.body.requires_grad_(False)
    alpha = {n: t.clone() for n, t in tk.densify(copy.deepcopy(module)).named_parameters()}
    optimizer = torch.optim.SGD(module.head.parameters(), 0.1)
    vars(module)["configure_optimizers"] = lambda: optimizer
    trainer_of(tmp_path, TopKastCallback(sparsifier)).fit(module, loader())
    for name in ("body.0.weight", "body.2.weight"):
        assert torch.equal(module.get_parameter(name), alpha[name])
    assert (module.head.weight != alpha["head.weight"]).any()
    assert sparsifier.steps == STEPS


class Tied(LightningModule):
    """Reads the weight of its embedding in a step, outside any forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)

    def training_step(self, batch: tuple[Tensor]) -> Tensor:
        return cross_entropy(self.embedding(batch[0]) @ self.embedding.weight.T, batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("whole", [True, False])
def test_a_step_of_a_module_reads_alpha(whole: bool, tmp_path: Path) -> None:
    module, tokens = Tied().double(), torch.arange(12)
    config = tk.TopKastConfig(0.5, 0.25, penalty=None)
    sparsifier = tk.sparsify(module if whole else module.embedding, config)
    start, (masks,) = module.embedding.weight.detach().clone(), sparsifier.masks().values()
    alpha = torch.where(masks.forward, start, 0.0).requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(alpha[tokens] @ alpha.T, tokens), alpha)
    callback = TopKastCallback(sparsifier, densify_at_end=False)
    options: Any = {"max_epochs": 1, "gradient_clip_val": None, "accumulate_grad_batches": 1}
    trainer = trainer_of(tmp_path, callback, **options)
    trainer.fit(module, DataLoader(TensorDataset(tokens), 12))
    moved = module.embedding.weight - start
    torch.testing.assert_close(moved, torch.where(masks.backward, -0.1 * gradient, 0.0))
    assert moved[masks.backward & ~masks.forward].any()
    assert "training_step" not in vars(module)


class Watched(Classifier):
    """Has a validation loss."""

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.training_step(batch)


ONCE: dict[str, Any] = {"max_epochs": 1, "gradient_clip_val": None, "accumulate_grad_batches": 1}


def test_a_copy_that_is_made_meanwhile_steps_by_itself(tmp_path: Path) -> None:
    """That of a callback which averages, or teaches, say."""
    batch, found = next(iter(loader())), []

    class Copying(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            copied = copy.deepcopy(pl_module)
            with torch.no_grad():
                for parameter in copied.parameters():
                    parameter.zero_()
                found.extend([copied.validation_step(batch), pl_module.validation_step(batch)])

    module = Watched()
    callback = TopKastCallback(tk.sparsify(module, CONFIG))
    trainer_of(tmp_path, Copying(), callback, **ONCE).fit(module, loader(), loader())
    of_copy, own = found
    even = torch.tensor(3.0).log().double()  # of three classes, by weights that are zero
    torch.testing.assert_close(of_copy, even)
    assert (own - even).abs() > 1e-3


class Failing(Watched):
    """Raises between what is before the step of an optimiser, and that."""

    broken: int | None = 3

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step == self.broken:
            raise ArithmeticError("lost")


def test_an_exception_leaves_the_module_as_it_was_and_the_next_run_counts(tmp_path: Path) -> None:
    module = Failing()
    sparsifier = tk.sparsify(module, CONFIG)
    callback = TopKastCallback(sparsifier)
    with pytest.raises(ArithmeticError):
        trainer_of(tmp_path, callback, **ONCE).fit(module, loader(), loader())
    assert not {"training_step", "validation_step"} & vars(module).keys()
    assert not module._load_state_dict_pre_hooks
    module.broken, before = None, sparsifier.steps
    options = {**ONCE, "accumulate_grad_batches": 2}
    trainer_of(tmp_path, callback, **options).fit(module, loader(), loader())
    assert sparsifier.steps == before + 5


class Choosy(Classifier):
    """Leaves batches out."""

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Any:  # type: ignore[override]
        return super().training_step(batch) if number < 5 else None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*training_step.* returned .None.")
def test_a_batch_that_is_left_out_is_no_step(tmp_path: Path) -> None:
    module, seen = Choosy(), []

    class Watching(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            seen.append(pl_module.body[0].weight.detach().clone())

    sparsifier = tk.sparsify(module, CONFIG)
    callback = TopKastCallback(sparsifier, densify_at_end=False)
    trainer_of(tmp_path, callback, Watching(), **ONCE).fit(module, loader())
    assert sparsifier.steps == 5
    assert not torch.equal(seen[3], seen[4])
    assert torch.equal(seen[4], seen[-1])


class Toggling(LightningModule):
    """Two sparse networks against each other, the one stepped twice in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker, self.judge = nn.Linear(12, 12), nn.Linear(12, 8)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        optimizers: Any = self.optimizers()
        of_judge, of_maker = optimizers
        for optimizer, sign in ((of_judge, -1), (of_judge, -1), (of_maker, 1)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(sign * torch.tanh(self.judge(self.maker(batch[0]))).mean())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.judge, self.maker)]


def test_a_refresh_sees_weights_that_are_frozen_for_the_moment(tmp_path: Path) -> None:
    module = Toggling().double()
    config = tk.TopKastConfig(0.8, 0.5, refresh_every=1, method=tk.random_backward())
    sparsifier = tk.sparsify(module, config)
    chosen: list[dict[str, tk.Masks]] = []
    count = sparsifier.step

    def step() -> bool:
        due = count()
        chosen.append(sparsifier.masks())
        return due

    vars(sparsifier)["step"] = step
    trainer_of(tmp_path, TopKastCallback(sparsifier), **ONCE).fit(module, loader())
    assert len(chosen) == 20
    for before, after in pairwise(chosen):
        for name in ("maker.weight", "judge.weight"):
            assert not torch.equal(before[name].backward, after[name].backward)


class HeadApart(Adversaries):
    """The dense part steps more often than the sparse one, and first."""

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        super().training_step(batch, 1)
        if number % 3 == 2:
            super().training_step(batch, 0)


def test_steps_of_a_dense_part_are_not_counted(tmp_path: Path) -> None:
    module = HeadApart().double()
    config = tk.TopKastConfig(0.8, 0.5, refresh_every=2, keep_dense="dense.*")
    sparsifier = tk.sparsify(module, config)
    trainer_of(tmp_path, TopKastCallback(sparsifier), **ONCE).fit(module, loader())
    assert sparsifier.steps == 3


class Saving(Callback):
    """Saves after the third step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_is_the_same_whoever_is_first_at_the_end_of_a_batch(tmp_path: Path) -> None:
    """That of before the callback of a refresh, too, and what is saved in between the same."""
    module = classifier()
    sparsifier = tk.sparsify(module, CONFIG)
    start = sparsifier.masks()
    callback = TopKastCallback(sparsifier)
    first, last = (Saving(tmp_path / name) for name in ("first", "last"))
    trainer_of(tmp_path, first, callback, last, **ONCE).fit(module, loader())
    assert sparsifier.steps == 10
    early, late = (torch.load(saving.path, weights_only=True) for saving in (first, last))
    ((key, record),) = late["callbacks"].items()
    assert early["callbacks"] == {key: record}
    assert record["steps"] == 3
    for name, tensor in late["state_dict"].items():
        assert torch.equal(early["state_dict"][name], tensor)
    sets = unpacked(
        late["state_dict"]["body.0.weight_sets"][0], module.get_parameter("body.0.weight").shape
    )
    assert not torch.equal(sets, start["body.0.weight"].forward)


class Decorated(Classifier):
    """Its validation is decorated, and takes the batch alone."""

    @torch.no_grad()
    def validation_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self(batch[0]).sum()


def test_a_decorated_step_takes_what_it_took(tmp_path: Path) -> None:
    module = Decorated()
    callback = TopKastCallback(tk.sparsify(module, CONFIG))
    trainer_of(tmp_path, callback, **ONCE).fit(module, loader(), loader())


def test_a_sparsifier_has_one_callback(tmp_path: Path) -> None:
    module = classifier()
    sparsifier = tk.sparsify(module, CONFIG)
    callbacks = [TopKastCallback(sparsifier, name=name) for name in ("a", "b")]
    with pytest.raises(ValueError, match="two callbacks have one sparsifier"):
        trainer_of(tmp_path, *callbacks).fit(module, loader())


# --- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["never", "densified"])
def test_a_module_that_is_not_sparse_is_refused(state: str, tmp_path: Path) -> None:
    sparse = classifier()
    callback = TopKastCallback(tk.sparsify(sparse, CONFIG))
    if state == "densified":
        tk.densify(sparse)
    module = sparse if state == "densified" else classifier()
    before = copy.deepcopy(module)
    with pytest.raises(ValueError, match=r"model was never sparsified, .*: call tk\.sparsify"):
        trainer_of(tmp_path, callback).fit(module, loader())
    assert_same(module, before)


def test_an_optimizer_over_other_parameters_is_refused(tmp_path: Path) -> None:
    module: Any = classifier()
    callback = TopKastCallback(tk.sparsify(module, CONFIG))
    optimizer = torch.optim.SGD(module.head.parameters(), 0.1)
    vars(module)["configure_optimizers"] = lambda: optimizer
    with pytest.raises(ValueError, match="the optimizer holds none of the sparse weights"):
        trainer_of(tmp_path, callback).fit(module, loader())


def test_a_checkpoint_of_another_sparsity_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(RuntimeError, match="the checkpoint is of another sparsity"):
        trained(tmp_path / "0.9", replace(CONFIG, forward_sparsity=0.9), tmp_path / "step=5.ckpt")


def test_what_is_no_sparsifier_is_refused() -> None:
    wrong: Any = CONFIG
    with pytest.raises(TypeError, match=r"tk\.sparsify\(model, config\) returns, got TopKastConf"):
        TopKastCallback(wrong)
