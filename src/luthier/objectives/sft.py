"""Supervised fine-tuning: make the labelled tokens probable.

    loss = - sum over labelled tokens of log p(token | everything before it in its row)

divided by the loop by the number of units in the whole optimiser step, over all micro-batches and devices. With
`normaliser: token` that is the global token mean: the same number whether a step is one batch of 32 rows or 32
batches of one. With `normaliser: sequence` each answer's own mean is taken first, so that short answers are not
drowned by long ones; use it where answers differ in length by orders of magnitude and each matters alike.

When not to use it: with preferences (pairs of a better and a worse answer) or rewards, which say more than imitation.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.objectives.base import Batch, Loss, Normaliser, Objective, labelled, sequence_index
from luthier.objectives.logprobs import token_logprobs


class Sft(Objective):
    """Negative log-likelihood of the labelled tokens, in nats."""

    method: Literal["sft"] = "sft"
    paper: ClassVar[int | None] = None
    normaliser: Normaliser = "token"

    def units(self, batch: Batch) -> dict[str, float]:
        chosen = labelled(batch["labels"])
        if self.normaliser == "token":
            return {"token": float(chosen.sum())}
        return {"sequence": float(sequence_index(batch)[chosen].unique().numel())}

    def loss(self, model: nn.Module, batch: Batch, credit: Tensor | None = None) -> Loss:
        scored = token_logprobs(model, batch)
        losses = -scored.logprobs if credit is None else -scored.logprobs * credit
        tokens = float(losses.numel())
        metrics = {
            "token_loss": (float(losses.detach().sum()), tokens),
            "token_accuracy": (float(scored.correct.sum()), tokens),
        }
        if self.normaliser == "token":
            return Loss({"token": losses.sum()}, {"token": tokens}, metrics)
        sequences = sequence_index(batch)[labelled(batch["labels"])]
        value, units = sum_of_means(losses, sequences)
        return Loss({"sequence": value}, {"sequence": units}, metrics)


def sum_of_means(values: Tensor, groups: Tensor) -> tuple[Tensor, float]:
    """The sum over groups of each group's mean, and the number of groups.

    Args:
        values: (tokens,) float.
        groups: (tokens,) int64, the group of each value; any labels.
    """
    _, index, sizes = groups.unique(return_inverse=True, return_counts=True)
    return (values / sizes[index].to(values.dtype)).sum(), float(torch.numel(sizes))
