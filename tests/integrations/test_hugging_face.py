"""A tiny BERT in the Trainer of Hugging Face, beside a loop by hand."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

import topkast_func as tk
from tests.integrations.states import assert_same
from topkast_func.bits import unpacked
from topkast_func.integrations.hugging_face import TopKastCallback

CONFIG = tk.TopKastConfig(
    0.8,
    0.5,
    sparse="*encoder*weight",
    keep_dense="*LayerNorm*",
    refresh_every=3,
    penalty_weight=0.1,
)
STEPS, ACCUMULATED, BATCH, RATE, CLIP = 7, 2, 4, 0.02, 0.5
ARGUMENTS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATED,
    "learning_rate": RATE,
    "warmup_steps": 3,
    "max_grad_norm": CLIP,
    "weight_decay": 0.1,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
}


class Sentences(IterableDataset[dict[str, Tensor]]):
    """Tokens, and whether the first is odd, always the same."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        tokens = torch.randint(32, (200, 6), generator=torch.Generator().manual_seed(1))
        return iter({"input_ids": row, "labels": row[0] % 2} for row in tokens)


def bert(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32}
    rates: Any = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes, **rates)
    model: Any = BertForSequenceClassification(config)
    return model.to(dtype)


def trainer_of(model: Any, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    arguments = TrainingArguments(str(folder), **{**ARGUMENTS, **options})
    return Trainer(model, arguments, train_dataset=Sentences(), callbacks=list(callbacks))


def trained(
    folder: Path, model: Any = None, config: Any = CONFIG, resume: Any = None, **options: Any
) -> tuple[Any, tk.Sparsifier]:
    """Train a sparse BERT, and leave it sparse."""
    model = model or bert()
    sparsifier = tk.sparsify(model, config)
    callback = TopKastCallback(sparsifier, densify_at_end=False)
    trainer_of(model, folder, callback, **options).train(resume_from_checkpoint=resume)
    return model, sparsifier


def by_hand(config: tk.TopKastConfig) -> tuple[Any, tk.Sparsifier, float]:
    """Train as `trained` does, with the penalty in the loss."""
    model = bert(dtype=torch.float64)
    sparsifier = tk.sparsify(model, config)
    decayed = [p for n, p in model.named_parameters() if n.endswith("weight") and "Norm" not in n]
    rest = [p for p in model.parameters() if all(p is not q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    schedule = get_linear_schedule_with_warmup(optimizer, 3, STEPS)  # type: ignore[no-untyped-call]
    rows, norms = iter(Sentences()), []
    for _ in range(STEPS):
        for _ in range(ACCUMULATED):
            examples = [next(rows) for _ in range(BATCH)]
            batch = {key: torch.stack([row[key] for row in examples]) for key in examples[0]}
            loss = model(**batch).loss  # of which the trainer takes the sum over a step
            (loss + sparsifier.penalty() / ACCUMULATED).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        sparsifier.step()
        schedule.step()
        optimizer.zero_grad()
    return model, sparsifier, max(norms)


@pytest.mark.parametrize("method", [tk.topkast(), tk.rigl()])
def test_the_trainer_trains_as_a_loop_by_hand(method: tk.Method, tmp_path: Path) -> None:
    config = replace(CONFIG, method=method)
    model, sparsifier = trained(tmp_path, bert(dtype=torch.float64), config)
    expected, handle, norm = by_hand(config)
    assert norm > CLIP
    told = {"steps": STEPS, "seed": 0, "powerprop": 1.0}
    assert sparsifier.state_dict() == handle.state_dict() == told
    start, theta = bert(dtype=torch.float64), dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        moved = theta[name] - start.get_parameter(name)
        torch.testing.assert_close(parameter - start.get_parameter(name), moved)
        assert moved.any()
    for name, masks in sparsifier.masks().items():
        assert all(map(torch.equal, masks, handle.masks()[name]))
    assert len(sparsifier.masks()) == 12


def test_parts_of_a_model_have_callbacks_of_their_own(tmp_path: Path) -> None:
    """Each with a configuration, a seed and a name; two of one name are refused."""

    def train(resume: Path | None, *names: str) -> tuple[Any, list[tk.Sparsifier]]:
        model = bert()
        first, second = model.bert.encoder.layer
        config = replace(CONFIG, sparse=None, keep_dense="*LayerNorm*", penalty=None)
        configs = config, replace(config, method=tk.set(), powerprop=2.0)
        told = [tk.sparsify(first, configs[0], seed=1), tk.sparsify(second, configs[1], seed=2)]
        callbacks = [
            TopKastCallback(one, densify_at_end=False, name=name)
            for one, name in zip(told, names, strict=True)
        ]
        options: Any = {"save_strategy": "steps", "save_steps": 4}
        trainer = trainer_of(model, tmp_path, *callbacks, **options)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return model, told

    model, told = train(None, "first", "second")
    assert [one.steps for one in told] == [STEPS, STEPS]
    again, resumed = train(tmp_path / "checkpoint-4", "first", "second")
    assert [one.state_dict()["seed"] for one in resumed] == [1, 2]
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    with pytest.raises(ValueError, match=r"two callbacks have the name ''.*a name of its own"):
        train(None, "", "")


def test_the_penalty_is_there_without_a_word_in_the_loss(tmp_path: Path) -> None:
    with_penalty, sparsifier = trained(tmp_path, max_steps=2)  # the first has a rate of 0
    without, _ = trained(tmp_path, config=replace(CONFIG, penalty=None), max_steps=2)
    for name in sparsifier.masks():
        assert not torch.equal(with_penalty.get_parameter(name), without.get_parameter(name))


@pytest.mark.parametrize(("name", "steps"), [("topkast", 6), ("set", 2)])
def test_a_run_resumed_from_a_checkpoint_goes_on_bit_for_bit(
    name: str, steps: int, tmp_path: Path
) -> None:
    config = replace(CONFIG, method=getattr(tk, name)())
    saving: Any = {"save_strategy": "steps", "save_steps": 2}
    whole, its = trained(tmp_path, bert(dropout=0.1), config, **saving)
    folder = str(tmp_path / f"checkpoint-{steps}")
    resumed, handle = trained(tmp_path / "other", bert(dropout=0.1), config, folder)
    assert_same(resumed, whole)
    assert handle.state_dict() == its.state_dict()


def test_what_is_saved_in_the_end_is_a_plain_model_and_a_checkpoint_is_not(tmp_path: Path) -> None:
    model, inputs = bert(), torch.randint(32, (3, 6))
    sparsifier = tk.sparsify(model, CONFIG)
    sets = {f"{name}_sets" for name in sparsifier.masks()}
    options: Any = {"save_strategy": "steps", "save_steps": STEPS}
    trainer = trainer_of(model, tmp_path, TopKastCallback(sparsifier), **options)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    load: Any = BertForSequenceClassification.from_pretrained
    final, told = load(tmp_path / "final", output_loading_info=True)
    assert not any(told.values())
    torch.testing.assert_close(final(inputs).logits, model.eval()(inputs).logits)
    running, told = load(tmp_path / f"checkpoint-{STEPS}", output_loading_info=True)
    assert set(told["unexpected_keys"]) == sets
    assert not told["missing_keys"]
    state = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    for name in (key.removesuffix("_sets") for key in sets):
        inside = unpacked(state[f"{name}_sets"][0], state[name].shape)
        assert torch.equal(final.get_parameter(name), torch.where(inside, state[name], 0.0))
        assert state[name][~inside].any()
    tk.sparsify(running, CONFIG)
    running.load_state_dict(state)
    torch.testing.assert_close(running.eval()(inputs).logits, final(inputs).logits)


def test_half_precision_leaves_a_model_that_computes(tmp_path: Path) -> None:
    model = bert()
    callback = TopKastCallback(tk.sparsify(model, CONFIG))
    trainer = trainer_of(model, tmp_path, callback, bf16=True, max_steps=2)
    trainer.train()
    with torch.no_grad():
        assert model.eval()(torch.randint(32, (3, 6))).logits.isfinite().all()


def test_a_gradient_that_is_scaled_gets_a_penalty_that_is(tmp_path: Path) -> None:
    model = bert()
    sparsifier = tk.sparsify(model, CONFIG)
    optimizer: Any = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    nothing: Any = None
    TopKastCallback(sparsifier).on_step_begin(nothing, nothing, nothing, optimizer=optimizer)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == sparsifier.masks().keys()
    model.zero_grad()
    sparsifier.penalty().backward()  # type: ignore[no-untyped-call]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, 64.0 * model.get_parameter(name).grad)


# --- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["never", "another", "densified"])
def test_a_model_that_is_not_sparse_is_refused(state: str, tmp_path: Path) -> None:
    sparse = bert()
    callback = TopKastCallback(tk.sparsify(sparse, CONFIG))
    if state == "densified":
        tk.densify(sparse)
    model = {"never": bert(), "another": bert(), "densified": sparse}[state]
    if state == "another":
        tk.sparsify(model, CONFIG)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"never sparsified, .*, or is not that of .*: call tk\.sparsify"
    ):
        trainer_of(model, tmp_path, callback).train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_optimizer_over_other_parameters_is_refused(tmp_path: Path) -> None:
    model = bert()
    callback = TopKastCallback(tk.sparsify(model, CONFIG))
    trainer = trainer_of(model, tmp_path, callback)
    trainer.optimizer = torch.optim.AdamW(model.classifier.parameters())
    with pytest.raises(ValueError, match="the optimizer holds none of the sparse weights"):
        trainer.train()


def test_a_checkpoint_of_another_sparsity_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    with pytest.raises(RuntimeError, match="the checkpoint is of another sparsity"):
        trained(tmp_path, config=replace(CONFIG, forward_sparsity=0.9), resume=True)


def test_a_plain_model_that_is_to_go_on_where_a_sparse_one_was_is_told_how(tmp_path: Path) -> None:
    trained(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    callback = TopKastCallback(tk.sparsify(bert(), CONFIG))
    trainer = trainer_of(bert(), tmp_path, callback, max_steps=2)
    with pytest.raises(ValueError, match=r"The checkpoint is of a sparse run, .* sparsify the mod"):
        trainer.train(resume_from_checkpoint=True)


def test_a_run_is_resumed_under_the_name_that_it_had(tmp_path: Path) -> None:
    model = bert()
    saving: Any = {"save_strategy": "steps", "save_steps": 2}
    callback = TopKastCallback(tk.sparsify(model, CONFIG), name="a")
    trainer_of(model, tmp_path, callback, **saving).train()
    again = bert()
    trainer = trainer_of(again, tmp_path, TopKastCallback(tk.sparsify(again, CONFIG)))
    with pytest.raises(ValueError, match=r"has \['topkast_func.Sparsifier.a'\] of callbacks"):
        trainer.train(resume_from_checkpoint=True)


def test_a_sparsifier_has_one_callback(tmp_path: Path) -> None:
    model = bert()
    sparsifier = tk.sparsify(model, CONFIG)
    callbacks = [TopKastCallback(sparsifier, name=name) for name in ("a", "b")]
    with pytest.raises(ValueError, match="two callbacks have one sparsifier"):
        trainer_of(model, tmp_path, *callbacks).train()


def test_what_is_no_sparsifier_is_refused() -> None:
    wrong: Any = bert()
    with pytest.raises(TypeError, match=r"tk\.sparsify\(model, config\) returns, got BertFor"):
        TopKastCallback(wrong)
