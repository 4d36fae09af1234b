"""Any tuning inside transformers' `Trainer` or TRL's `SFTTrainer`: attach it, then hand its hooks to their loop.

    tuned = Lisa(active_layers=2).attach(model, Probe(Topology.of(model)))
    trainer = Trainer(model=tuned.model, ..., callbacks=[TuningCallback(tuned)])

Their loop counts optimiser steps as ours does (`global_step`), builds its optimiser from what has a gradient when
training starts, and clips before `on_grad` is told: tunings that change gradients see them clipped there.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from luthier.train.optimizers import inner
from luthier.tune.base import Tuned


class TuningCallback(TrainerCallback):
    """Calls the hooks of `tuned` at the right moments of a `Trainer`."""

    def __init__(self, tuned: Tuned):
        self.tuned = tuned

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = math.ceil(state.max_steps / max(1, math.ceil(state.num_train_epochs)))
        self.tuned.on_phase_begin(inner(kwargs["optimizer"]), max(1, steps), state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tuned.on_step_begin(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tuned.on_grad(state.global_step)
        self.tuned.on_clipped(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.tuned.on_step_end(state.global_step - 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tuned.on_phase_end()
