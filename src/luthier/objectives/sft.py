"""Supervised fine-tuning: make the labelled tokens probable.

    loss = - sum over labelled tokens of log p(token | everything before it in its row)

divided by the loop by the number of units in the whole optimiser step, over all micro-batches and devices. With
`normaliser: token` that is the global token mean: the same number whether a step is one batch of 32 rows or 32
batches of one. With `normaliser: sequence` each answer's own mean is taken first, so that short answers are not
drowned by long ones; use it where answers differ in length by orders of magnitude and each matters alike.

Of pairs it learns the chosen answers only, of judged answers the desirable ones; by itself it does not even look at the
others, and in a list of objectives it passes them over.

When not to use it: with preferences (pairs of a better and a worse answer) or rewards, which say more than imitation.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from luthier.objectives.base import Loss, Needs, Normaliser, Objective
from luthier.objectives.batch import Batch, good, labelled, sequence_index
from luthier.objectives.logprobs import TokenLogprobs


class Sft(Objective):
    """Negative log-likelihood of the labelled tokens, in nats."""

    method: Literal["sft"] = "sft"
    paper: ClassVar[int | None] = None
    normaliser: Normaliser = "token"

    def needs(self) -> Needs:
        return Needs(learns_from=("examples", "pairs", "judged"))

    def units(self, batch: Batch) -> dict[str, float]:
        sequences, imitated = _sequences(batch)
        kept = sequences if imitated is None else sequences[imitated]
        return {self.normaliser: float(kept.numel() if self.normaliser == "token" else kept.unique().numel())}

    def judge(self, scored: TokenLogprobs, batch: Batch, credit: Tensor | None = None) -> Loss:
        losses = -scored.logprobs if credit is None else -scored.logprobs * credit
        correct, (sequences, imitated) = scored.correct, _sequences(batch)
        if imitated is not None:
            losses, correct, sequences = losses[imitated], correct[imitated], sequences[imitated]
        tokens = float(losses.numel())
        metrics = {
            "token_loss": (float(losses.detach().sum()), tokens),
            "token_accuracy": (float(correct.sum()), tokens),
        }
        if self.normaliser == "token":
            return Loss({"token": losses.sum()}, {"token": tokens}, metrics)
        value, units = sum_of_means(losses, sequences)
        return Loss({"sequence": value}, {"sequence": units}, metrics)


def _sequences(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The sequence of each labelled token, and which of these tokens are to be imitated (None: all)."""
    sequences, fit = sequence_index(batch)[labelled(batch["labels"])], good(batch)
    return sequences, None if fit is None else fit[sequences]


def sum_of_means(values: Tensor, groups: Tensor) -> tuple[Tensor, float]:
    """The sum over groups of each group's mean, and the number of groups.

    Args:
        values: (tokens,) float.
        groups: (tokens,) int64, the group of each value; any labels.
    """
    _, index, sizes = groups.unique(return_inverse=True, return_counts=True)
    return (values / sizes[index].to(values.dtype)).sum(), float(torch.numel(sizes))
