"""The contract of an objective, and what it hands to the loop.

The loop computes one number per optimiser step: for each unit that the objective names, `sum / number of units` over
all micro-batches of the step on all devices, and the sum of these. An objective therefore never divides: it returns
sums and says how many units it summed over. What a unit is, is always explicit, because it changes what is learned:

    token      every labelled token counts the same: long answers weigh more (the default of most trainers' papers)
    sequence   every answer counts the same: each one's mean over its tokens is one unit
    pair       every pair of a better and a worse answer counts the same (preference losses)
    answer     every judged answer counts the same (`kto`)
    row        every row with a class counts the same (`classification`)

A mean of micro-batch means, which weighs tokens of short micro-batches more, cannot be expressed here.

A loss is made in two halves, so that several objectives can share one forward pass (`luthier.objectives.weighted`):
`prepare` adds to the batch what else the objective must know, and `judge` turns the log-probabilities of the labelled
tokens into sums. `classification` scores no tokens and has a `loss` of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.data.encode import Encoded
from luthier.methods import Method
from luthier.objectives.anchor import BaseAnchor
from luthier.objectives.batch import Batch, part
from luthier.objectives.logprobs import TokenLogprobs, token_logprobs

Normaliser = Literal["token", "sequence"]


@dataclass(frozen=True)
class Loss:
    """What an objective says about one micro-batch.

    Attributes:
        sums: by unit, a scalar float32 with gradient: the SUM of the loss over these units (nats for likelihoods),
            with any weight of this part of the objective in it.
        units: by unit, how many were summed; equals `Objective.units(batch)`.
        metrics: named (sum, weight) pairs without gradient; the loop reports sum of sums over sum of weights.
        anchor: a second loss that a tuning asked for, beside these sums and in none of them: scalar float32 with
            gradient, the SUM over the labelled tokens of the plain part of the batch, or its labelled
            rows; None unless asked.
    """

    sums: dict[str, Tensor]
    units: dict[str, float]
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    anchor: Tensor | None = None

    def anchored(self, scored: TokenLogprobs) -> Loss:
        """This loss with the anchor that was scored beside it, if one was."""
        if scored.anchored is None:
            return self
        total = scored.anchored.sum()
        told = {"anchor_loss": (float(total.detach()), float(scored.anchored.numel()))}
        return replace(self, anchor=total, metrics=self.metrics | told)

    def value(self, units: Mapping[str, float] | None = None) -> Tensor:
        """Scalar: the sums divided by `units` (default: this micro-batch's own) and added; units of 0 give 0."""
        over = self.units if units is None else units
        return torch.stack([part / over[name] if over[name] else part * 0 for name, part in self.sums.items()]).sum()


@dataclass(frozen=True)
class ReferenceFrom:
    """Where a reference comes from: see `luthier.objectives.preference`. `model` is as `model.base` of a recipe."""

    source: Literal["auto", "adapter_off", "model", "cached"] = "auto"
    model: str | None = None


@dataclass(frozen=True)
class Needs:
    """What an objective needs of the loop.

    Attributes:
        learns_from: kinds of items it can learn from, the one it likes best first: see `luthier.data.views`.
        reference: where its reference comes from; None if it needs none.
        referenced: prefixes of the parts of a batch whose answers the loop scores under the reference too, as
            `<prefix>reference_logprobs` (sequences,): see `luthier.train.reference`.
        prompts_at_a_time: different prompts that a micro-batch must hold at least.
        learning_rate_scale: what a tuning's default learning rate is multiplied by.
        without_dropout: whether dropout must be off: a comparison with a reference should not be of two noises.
    """

    learns_from: tuple[str, ...] = ("examples",)
    reference: ReferenceFrom | None = None
    referenced: tuple[str, ...] = ()
    prompts_at_a_time: int = 1
    learning_rate_scale: float = 1.0
    without_dropout: bool = False


class Objective(Method):
    """Base of all objectives. Verb: `loss`, which is `prepare`, one forward pass, `judge`."""

    room: ClassVar[str] = "objectives"

    def needs(self) -> Needs:
        """What it asks of the loop."""
        return Needs()

    @property
    def learns_labels(self) -> bool:
        """Whether it learns one class per row, from a model that predicts classes, and not tokens."""
        return "labelled" in self.needs().learns_from

    @property
    def widens_labels(self) -> bool:
        """Whether `arrange` labels more than the answers."""
        return False

    def arrange(self, rows: Sequence[Encoded], longest: int | None = None) -> dict[str, list[Encoded]]:
        """The sequences of one micro-batch, by prefix of their tensors' names; the plain ones have the prefix ''.

        Labels of the plain part may be widened; those of the answers then stand in a part `answer_` of the same rows.

        Args:
            rows: encoded examples as `luthier.data.views` lays them out, good ones first; of n pairs, 2n.
            longest: tokens of the longest sequence of all the data; no other may become longer. None: no limit.
        """
        return {"": list(rows)}

    def units(self, batch: Batch) -> dict[str, float]:
        """How many units of each kind `loss(model, batch)` will sum over, known without running the model."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with what `judge` needs beside the plain forward pass; without gradient."""
        return batch

    def judge(self, scored: TokenLogprobs, batch: Batch, credit: Tensor | None = None) -> Loss:
        """The loss, given the log-probabilities of the labelled tokens of the plain part of the batch."""
        raise NotImplementedError

    def loss(
        self, model: nn.Module, batch: Batch, credit: Tensor | None = None, anchor: BaseAnchor | None = None
    ) -> Loss:
        """The loss of one micro-batch.

        Args:
            model: a causal language model of transformers, or for `classification` one that gives a row's classes;
                possibly wrapped by PEFT.
            batch: see `luthier.objectives.batch`.
            credit: weights per labelled token from a rollout; None for learning from data.
            anchor: also say how far the answers to the plain part of the batch are from the base's.
        """
        ready = self.prepare(model, batch)
        scored = token_logprobs(model, part(ready, ""), anchor=anchor)
        return self.judge(scored, ready, credit).anchored(scored)
