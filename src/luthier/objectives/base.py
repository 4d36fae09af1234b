"""The contract of an objective, and what it hands to the loop.

The loop computes one number per optimiser step: for each unit that the objective names, `sum / number of units` over
all micro-batches of the step on all devices, and the sum of these. An objective therefore never divides: it returns
sums and says how many units it summed over. What a unit is, is always explicit, because it changes what is learned:

    token      every labelled token counts the same: long answers weigh more (the default of most trainers' papers)
    sequence   every answer counts the same: each one's mean over its tokens is one unit
    pair       every pair of a better and a worse answer counts the same (preference losses)

A mean of micro-batch means, which weighs tokens of short micro-batches more, cannot be expressed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.data.encode import Encoded
from luthier.methods import Method

_MODEL_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")
IGNORED = -100  # the label of a position that carries no loss, as everywhere in transformers

Batch = Mapping[str, Tensor]
Normaliser = Literal["token", "sequence"]


@dataclass(frozen=True)
class Loss:
    """What an objective says about one micro-batch.

    Attributes:
        sums: by unit, a scalar float32 with gradient: the SUM of the loss over these units (nats for likelihoods),
            with any weight of this part of the objective in it.
        units: by unit, how many were summed; equals `Objective.units(batch)`.
        metrics: named (sum, weight) pairs without gradient; the loop reports sum of sums over sum of weights.
    """

    sums: dict[str, Tensor]
    units: dict[str, float]
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)

    def value(self, units: Mapping[str, float] | None = None) -> Tensor:
        """Scalar: the sums divided by `units` (default: this micro-batch's own) and added; units of 0 give 0."""
        over = self.units if units is None else units
        return torch.stack([part / over[name] if over[name] else part * 0 for name, part in self.sums.items()]).sum()


class Objective(Method):
    """Base of all objectives. Verb: `loss`.

    Attributes:
        pairs: whether it learns from pairs (rows with `chosen` and `rejected`) and not from single examples.
        referenced: prefixes of the parts of a batch whose answers the loop scores under the reference model too, as
            `<prefix>reference_logprobs` (sequences,): see `luthier.train.reference`.
        smallest_batch: pairs or examples that a micro-batch must have at least.
        learning_rate_scale: what a tuning's default learning rate is multiplied by.
    """

    room: ClassVar[str] = "objectives"
    pairs: ClassVar[bool] = False
    referenced: ClassVar[tuple[str, ...]] = ()
    smallest_batch: ClassVar[int] = 1
    learning_rate_scale: ClassVar[float] = 1.0

    @property
    def without_dropout(self) -> bool:
        """Whether the loop must switch dropout off: a comparison with a reference should not be of two noises."""
        return False

    def arrange(self, examples: Sequence[Any]) -> dict[str, list[Encoded]]:
        """The sequences of one micro-batch, by prefix of their tensors' names; the plain ones have the prefix ''.

        Args:
            examples: encoded examples, or (chosen, rejected) pairs of them for an objective that learns from pairs.
        """
        return {"": list(examples)}

    def units(self, batch: Batch) -> dict[str, float]:
        """How many units of each kind `loss(model, batch)` will sum over, known without running the model."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch, credit: Tensor | None = None) -> Loss:
        """The loss of one micro-batch.

        Args:
            model: a causal language model of transformers, possibly wrapped by PEFT.
            batch: tensors as `luthier.data.collate` makes them: `input_ids`, `labels` (rows, length) int64, and
                where needed `attention_mask` or `position_ids` of the same shape; prefixed as `arrange` says.
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
    starts = _starts(batch)
    return (starts.flatten().cumsum(0) - 1).view_as(starts)[:, 1:]


def sequence_count(batch: Batch) -> int:
    """How many sequences the batch holds."""
    return int(_starts(batch).sum())


def part(batch: Batch, prefix: str) -> dict[str, Tensor]:
    """What the model takes of one part of a batch, and its labels, without `prefix`."""
    return {name: batch[prefix + name] for name in _MODEL_COLUMNS if prefix + name in batch}


def _starts(batch: Batch) -> Tensor:
    """(rows, length) int64, 1 where a sequence begins."""
    starts = torch.zeros_like(batch["labels"])
    starts[:, 0] = 1
    if "position_ids" in batch:
        starts = torch.where(batch["position_ids"] == 0, 1, starts)
    return starts
