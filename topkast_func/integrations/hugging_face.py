"""Sparse training by the Trainer of Hugging Face, an optional extra."""

from typing import Any

from topkast_func.integrations.host import Hosted

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as reason:
    raise ImportError(
        f"no Trainer of Hugging Face ({reason}): pip install 'topkast_func[hf]'"
    ) from reason

RECORD = "topkast_func.Sparsifier"
"""Where ``trainer_state.json`` keeps the number of the step, among the states of callbacks."""


NAMES = "give each a name of its own, as in TopKastCallback(sparsifier, name='encoder')"
"""The way on."""

UNKNOWN = (
    "the checkpoint has {} of callbacks, and no {!r}: give the callback the name that it had when "
    "the checkpoint was written"
)


class TopKastCallback(Hosted, TrainerCallback):
    """Lets `transformers.Trainer` train a model that `sparsify` has made sparse.

    It adds the gradient of the penalty, chooses the sets anew when that is due, and at the end
    leaves a plain model that holds α; ``save_model`` then writes that.

    A checkpoint of a run in progress, ``checkpoint-…``, holds θ, the sets (``…_sets``) and the
    number of the step, and is no plain model. To go on bit for bit, sparsify the model again with
    the same configuration, then ``train(resume_from_checkpoint=…)``. To make a plain model of it::

        tk.sparsify(model, config)
        model.load_state_dict(safetensors.torch.load_file("checkpoint-…/model.safetensors"))
        tk.densify(model)

    (with ``strict=False`` where weights are tied; the file does not tell ``powerprop``, which is to
    be that of the run). ``from_pretrained`` of it has θ, without the sets: it computes with all
    weights.

    The gradient of the penalty is there before those of the batches are added to it, so that it
    is clipped with them and no loss has to be changed; the loss that the trainer logs is without
    the penalty.

    Args:
        sparsifier: What `sparsify` returned for the model.
        densify_at_end: Whether the model becomes plain at the end. Without, it can be trained on.
        name: What tells it from another of the same trainer, of a part that was sparsified by
            itself; to resume, the same again.

    Raises:
        TypeError: The first argument is no sparsifier, or the name no text.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> import topkast_func as tk
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2)
        >>> model = BertForSequenceClassification(BertConfig(num_hidden_layers=1, **sizes))
        >>> config = tk.TopKastConfig(0.8, sparse="*encoder*weight", keep_dense="*LayerNorm*")
        >>> callback = TopKastCallback(tk.sparsify(model, config))

        ``Trainer(model, …, callbacks=[callback])`` then trains it.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Check that the sparse model is trained, and go on where a checkpoint was written."""
        records: Any = state.stateful_callbacks
        others: dict[str, TopKastCallback] = vars(state).setdefault(RECORD, {})
        if others.setdefault(self._record, self) is not self:
            raise ValueError(f"two callbacks have the name {self.name!r}: {NAMES}")
        self._check_alone(others.values())
        kept = [name for name in records if name.startswith(RECORD)]
        if kept and self._record not in kept:
            raise ValueError(UNKNOWN.format(kept, self._record))
        self._begin(given["model"], [given["optimizer"]], resumed=self._record in records)
        if self._record in records:
            self.sparsifier.load_state_dict(records[self._record])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Begin the gradient with that of the penalty, scaled as the loss is going to be."""
        optimizer = given["optimizer"]
        scale = 1.0 if optimizer.scaler is None else optimizer.scaler.get_scale()
        self.sparsifier.penalize(optimizer, scale)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Count the step, and choose the sets anew where that is due."""
        self.sparsifier.step()
        records: Any = state.stateful_callbacks
        records[self._record] = self.sparsifier.state_dict()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Leave a plain model."""
        self._end()

    @property
    def _record(self) -> str:
        return f"{RECORD}.{self.name}" if self.name else RECORD
