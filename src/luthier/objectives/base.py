"""The contract of an objective, and what it hands to the loop.

The loop computes one number per optimiser step, `sum of values / sum of units`, over all micro-batches of the step on
all devices. An objective therefore never divides: it returns the sum and says how many units it summed over. What a
unit is, is the objective's `normaliser`, always explicit, because it changes what is learned:

    token      every labelled token counts the same: long answers weigh more (the default of most trainers' papers)
    sequence   every answer counts the same: each one's mean over its tokens is one unit

A mean of micro-batch means, which weighs tokens of short micro-batches more, cannot be expressed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.methods import Method

IGNORED = -100  # the label of a position that carries no loss, as everywhere in transformers

Batch = Mapping[str, Tensor]
Normaliser = Literal["token", "sequence"]


@dataclass(frozen=True)
class Loss:
    """What an objective says about one micro-batch.

    Attributes:
        value: scalar float32 with gradient: the SUM of the loss over the units (nats for likelihood losses).
        units: how many units were summed; equals `Objective.units(batch)`.
        metrics: named (sum, weight) pairs without gradient; the loop reports sum of sums over sum of weights.
    """

    value: Tensor
    units: float
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)


class Objective(Method):
    """Base of all objectives. Verb: `loss`."""

    room: ClassVar[str] = "objectives"
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")

    def units(self, batch: Batch) -> float:
        """How many units `loss(model, batch)` will sum over, known without running the model."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch, credit: Tensor | None = None) -> Loss:
        """The loss of one micro-batch.

        Args:
            model: a causal language model of transformers, possibly wrapped by PEFT.
            batch: tensors as `luthier.data.collate` makes them: `input_ids`, `labels` (rows, length) int64, and
                where needed `attention_mask` or `position_ids` of the same shape.
            credit: weights per labelled token from a rollout; None for learning from data.
        """
        raise NotImplementedError


def labelled(labels: Tensor) -> Tensor:
    """Which positions predict a label: (rows, length) int64 -> (rows, length - 1) bool.

    Position i predicts `labels[:, i + 1]`, so the first label of a row never counts.
    """
    return labels[:, 1:] != IGNORED


def sequence_index(batch: Batch) -> Tensor:
    """Which sequence each predicted token belongs to: (rows, length - 1) int64, counted through the whole batch.

    A row is one sequence unless `position_ids` restart inside it (packing), where each restart begins a new one.
    """
    labels = batch["labels"]
    starts = torch.zeros_like(labels)
    starts[:, 0] = 1
    if "position_ids" in batch:
        starts = torch.where(batch["position_ids"] == 0, 1, starts)
    return (starts.flatten().cumsum(0) - 1).view_as(labels)[:, 1:]
