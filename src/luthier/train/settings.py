"""Settings of `tune.train`: how long, how fast, in which batches. Names are those of transformers' TrainingArguments
where one exists; `mixed_precision` is accelerate's, `early_stopping_patience` that of transformers' callback. Ours are
`effective_batch_size` (rows per optimiser step, over all devices), `min_steps_per_epoch` (a cap on it for small sets),
`max_tokens_per_device` (the size of a micro-batch, padding included) and `copilot`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]


class CopilotSettings(BaseModel):
    """A Copilot that is trained beside the model (`luthier.train.copilot`).

    Attributes:
        layers: of the Copilot, at least 2; null is as many as the model has that it starts from.
        width: of its states; null is that of the model that it starts from.
        init_from: `pilot` starts from the trained model's own layers; else the base whose layers are taken, as
            `model.base`, with the same vocabulary.
        learning_rate: peak of its own AdamW; rises and falls as the model's rate does.
        buffer: rounds that the mistake log holds, the oldest dropped first.
        loss: `rmse` as the paper, or `mse`, which shrinks small errors.
        include_current: let it see the state that gave a prediction when it guesses that prediction's error.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int | None = Field(default=None, ge=2)
    width: int | None = Field(default=None, ge=1)
    init_from: str = Field(default="pilot", min_length=1)
    learning_rate: float = Field(default=5e-4, gt=0, allow_inf_nan=False)
    buffer: int = Field(default=128, ge=1)
    loss: Literal["rmse", "mse"] = "rmse"
    include_current: bool = False


class TrainSettings(BaseModel):
    """How the loop trains.

    Attributes:
        learning_rate: peak; null is the tuning's own default (full 2e-5, LoRA 2e-4).
        num_train_epochs: passes over the training rows; may be a fraction. `max_steps`, if given, decides instead.
        effective_batch_size: rows per optimiser step, over all micro-batches and devices.
        min_steps_per_epoch: caps the effective batch at floor(rows / this), at least 1, so that an epoch has at least
            so many steps; null leaves it at what was asked for, or at all rows where there are fewer.
        max_tokens_per_device: tokens per micro-batch with padding; a single longer row is a batch of its own. Bounds
            memory and has no influence on the outcome.
        weight_decay: of matrices; null is the tuning's own default (0 for all but `sara`, 0.01).
        warmup_ratio, warmup_steps: the rise to the peak; `warmup_steps`, if given, decides. `constant` has no rise;
            `constant_with_warmup` has.
        group_by_length: let rows of like length share a step (less padding).
        logging_steps: every how many steps a line goes to `metrics.jsonl`.
        eval_steps, save_steps: every how many steps the validation loss is taken and a checkpoint written; null is
            once an epoch for evaluation and every 200 steps for checkpoints.
        save_strategy: `steps` writes checkpoints as `save_steps` says, `epoch` at the end of each epoch.
        load_best_model_at_end: hand over the weights with the lowest validation loss, not the last ones.
        early_stopping_patience: stop after so many validation losses in a row without a new lowest one.
        mixed_precision: arithmetic of the forward pass; weights stay in their own type.
        recompute_pointwise: make activations, gated products and norms again in the backward pass instead of keeping
            them (`luthier.train.pointwise`): less memory, a few percent more time, the same bits.
        give_back_freed_memory: give what is freed back to the system as a pass goes on (`luthier.models.allocator`), on
            a CPU with glibc: 4 to 9% less memory and 10 to 20% more time on a model of 135M parameters, the same bits.
        copilot: train a Copilot beside the model; the model itself is trained as without, to the last bit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    num_train_epochs: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    max_steps: int | None = Field(default=None, ge=1)
    effective_batch_size: int = Field(default=16, ge=1)
    min_steps_per_epoch: int | None = Field(default=None, ge=1)
    max_tokens_per_device: int = Field(default=2048, ge=1)
    group_by_length: bool = True
    lr_scheduler_type: Scheduler = "cosine"
    warmup_ratio: float = Field(default=0.05, ge=0, le=1)
    warmup_steps: int | None = Field(default=None, ge=0)
    optim: Literal["adamw_torch", "sgd", "adafactor"] = "adamw_torch"
    weight_decay: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    recompute_pointwise: bool = False
    give_back_freed_memory: bool = False
    logging_steps: int = Field(default=1, ge=1)
    eval_steps: int | None = Field(default=None, ge=1)
    save_strategy: Literal["steps", "epoch"] = "steps"
    save_steps: int | None = Field(default=None, ge=1)
    save_total_limit: int = Field(default=2, ge=1)
    load_best_model_at_end: bool = False
    early_stopping_patience: int | None = Field(default=None, ge=1)
    copilot: CopilotSettings | None = None

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: object) -> object:
        return "no" if value is False else value  # YAML reads a bare `no` as false

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainSettings:
        # Not whether the key was written: a recipe with all its defaults written out must load again.
        if self.warmup_steps is not None and self.warmup_ratio != type(self).model_fields["warmup_ratio"].default:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            raise ValueError("lr_scheduler_type constant has no warm-up; write constant_with_warmup")
        return self

    @model_validator(mode="after")
    def _one_interval(self) -> TrainSettings:
        if self.save_strategy == "epoch" and self.save_steps is not None:
            raise ValueError("give save_steps or save_strategy: epoch, not both")
        return self
