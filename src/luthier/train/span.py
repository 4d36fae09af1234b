"""How long a training is, from its settings and the number of rows alone: rows per step, steps, and when to save.

    rows per step     effective_batch_size, at most floor(rows / min_steps_per_epoch), never more than there are rows
    steps per epoch   ceil(rows / rows per step)
    steps             max_steps, or ceil(num_train_epochs * steps per epoch)

A batch that suits a million rows is a whole epoch of a thousand: the few steps that are left teach little. With
`min_steps_per_epoch` a large batch can stand in a recipe for sets of any size. Whoever needs these numbers (the loop,
the plan, a search over batch sizes) asks here, so that all of them say the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from luthier.train.settings import TrainSettings

SAVE_EVERY = 200  # optimiser steps, unless `save_steps` says otherwise


@dataclass(frozen=True)
class Span:
    """The length of one training.

    Attributes:
        rows: training rows, or pairs.
        rows_per_step: rows of each step over all devices; only the last step of an epoch may have fewer.
        save_every: a checkpoint is due after so many steps, and after the last one.
    """

    rows: int
    rows_per_step: int
    steps_per_epoch: int
    total: int
    save_every: int

    @classmethod
    def of(cls, settings: TrainSettings, rows: int) -> Span:
        """The span of a training on `rows` rows, at least 1."""
        cap = max(1, rows // (settings.min_steps_per_epoch or 1))
        per_step = min(settings.effective_batch_size, cap)
        per_epoch = math.ceil(rows / per_step)
        total = settings.max_steps or max(1, math.ceil(settings.num_train_epochs * per_epoch))
        every = per_epoch if settings.save_strategy == "epoch" else settings.save_steps or SAVE_EVERY
        return cls(rows, per_step, per_epoch, total, every)

    def samples(self, steps: int) -> int:
        """Rows seen after so many steps, each as often as it was seen."""
        epochs, inside = divmod(steps, self.steps_per_epoch)
        return epochs * self.rows + min(self.rows, inside * self.rows_per_step)

    def step(self, samples: int) -> int | None:
        """The step of this training that ends at exactly so many samples; None if there is none."""
        epochs, inside = divmod(samples, self.rows)
        step = epochs * self.steps_per_epoch + inside // self.rows_per_step
        return step if inside % self.rows_per_step == 0 and 1 <= step <= self.total else None
