"""Kahneman-Tversky optimisation (KTO): judge each answer by itself, against how far the model has moved in general.

    desirable     desirable_weight   (1 - sigmoid(beta (h - z0)))
    undesirable   undesirable_weight (1 - sigmoid(beta (z0 - h)))
    z0 = max(0, mean of h over mismatched prompts and answers), without gradient

The loss is the mean over answers. It learns from pairs, each one desirable and one undesirable answer, and from single
answers with a verdict (rows with prompt, completion and a label true or false). z0 estimates the distance of model and
reference on answers that were not asked for. Row i of a micro-batch (all desirable ones, then all undesirable ones) is
mismatched with the answer of row i - 1; where the two have the same prompt, of the next row with another prompt. It is
a mean over the micro-batch and over devices, so unlike all others here this loss depends a little on how a step is cut;
a micro-batch with one prompt only has nothing to mismatch, so the loop joins it to another. With many more answers of
one kind, weigh the other up: `desirable_weight` times their number should be near `undesirable_weight` times the number
of the others.

When not to use it: on few rows per micro-batch (z0 is then mostly noise), or where memory for a second pass over the
micro-batch is missing.

Ethayarajh et al. 2024; compared in Saeidi et al. 2024. Where prompts repeat we take the next row; TRL does not. A
mismatched row that would be longer than any row of the data is cut, as TRL does at its `max_length`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.distributed
from pydantic import Field, model_validator
from torch import Tensor, nn

from luthier.data.encode import Encoded
from luthier.errors import InputError
from luthier.objectives.base import Loss
from luthier.objectives.batch import IGNORED, Batch, part
from luthier.objectives.logprobs import TokenLogprobs, token_logprobs
from luthier.objectives.preference import Referenced, answer_sums, answer_tokens


class Kto(Referenced):
    """Sigmoid loss of single answers against a common zero."""

    method: Literal["kto"] = "kto"
    learns_from: ClassVar[tuple[str, ...]] = ("pairs", "judged")
    referenced: ClassVar[tuple[str, ...]] = ("", "mismatched_")
    prompts_at_a_time: ClassVar[int] = 2
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    desirable_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    undesirable_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _not_cached(self) -> Kto:
        if self.reference == "cached":
            raise ValueError("kto scores other answers in every micro-batch, so its reference cannot be cached")
        return self

    @property
    def reward_scale(self) -> float:
        return self.beta

    def arrange(self, rows: Sequence[Encoded], longest: int | None = None) -> dict[str, list[Encoded]]:
        return {"": list(rows), "mismatched_": mismatched(rows, longest)}

    def units(self, batch: Batch) -> dict[str, float]:
        return {"answer": float((answer_tokens(batch) > 0).sum())}

    def prepare(self, model: nn.Module, batch: Batch) -> Batch:
        other = part(batch, "mismatched_")
        reference = self._reference(batch, "mismatched_")
        with torch.no_grad():
            logps, tokens, _ = answer_sums(token_logprobs(model, other), other)
            return {**batch, "z0": _zero(logps - reference.to(logps), tokens > 0)}

    def judge(self, scored: TokenLogprobs, batch: Batch, credit: Tensor | None = None) -> Loss:
        self._refuse(credit)
        logps, tokens, _ = answer_sums(scored, batch)
        reference, z0, present = self._reference(batch).to(logps), batch["z0"], tokens > 0
        desirable = batch.get("desirable", torch.arange(len(logps), device=logps.device) < len(logps) // 2)
        losses = kto(
            logps,
            reference,
            desirable,
            z0,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        count = float(present.sum())
        if "desirable" in batch:
            metrics = self._rewards_of_singles(logps.detach(), reference, desirable, present)
        else:
            metrics = self.rewards(*self._pairs(batch, logps, tokens))
        metrics["z0"] = (float(z0) * count, count)
        return Loss({"answer": torch.where(present, losses, 0.0).sum()}, {"answer": count}, metrics)

    def _rewards_of_singles(
        self, lp: Tensor, rp: Tensor, desirable: Tensor, there: Tensor
    ) -> dict[str, tuple[float, float]]:
        """Means over the desirable and over the undesirable answers; single answers have no margin."""
        metrics = {}
        for name, kind in (("chosen", desirable & there), ("rejected", ~desirable & there)):
            metrics[f"rewards/{name}"] = (self.beta * float((lp - rp)[kind].sum()), float(kind.sum()))
            metrics[f"logps/{name}"] = (float(lp[kind].sum()), float(kind.sum()))
        return metrics


def kto(
    lp: Tensor,
    rp: Tensor,
    desirable: Tensor,
    z0: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """(n,) losses of single answers.

    Args:
        lp, rp: (n,) summed log-probabilities under the model and the reference.
        desirable: (n,) bool.
        z0: scalar, at least 0, without gradient.
    """
    h = beta * (lp - rp - z0)
    liked, disliked = desirable_weight * (1 - h.sigmoid()), undesirable_weight * (1 - (-h).sigmoid())
    return torch.where(desirable, liked, disliked)


def mismatched(rows: Sequence[Encoded], longest: int | None = None) -> list[Encoded]:
    """Each row's prompt with the answer of the row before it that has another prompt (see above for the order).

    None is longer than `longest` tokens; such a row is cut at its end.
    """
    split = [_split(row) for row in rows]
    return [_joined(split[i][0], split[_other(split, i)][1], longest) for i in range(len(rows))]


def _split(row: Encoded) -> tuple[list[int], list[int]]:
    labels = list(row["labels"])
    at = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
    ids = list(row["input_ids"])
    return ids[:at], ids[at:]


def _other(split: list[tuple[list[int], list[int]]], i: int) -> int:
    for step in range(len(split)):
        j = (i - 1 + step) % len(split)
        if split[j][0] != split[i][0]:
            return j
    if not split[i][1]:
        return i  # a device without rows of its own
    raise InputError(
        "a micro-batch of kto holds answers to one prompt only, so none is mismatched",
        where="objective",
        fix="raise tune.train.max_tokens_per_device or effective_batch_size, or use another objective",
    )


def _joined(prompt: list[int], answer: list[int], longest: int | None) -> Encoded:
    return {"input_ids": (prompt + answer)[:longest], "labels": ([IGNORED] * len(prompt) + answer)[:longest]}


def _zero(h: Tensor, there: Tensor) -> Tensor:
    """max(0, mean of h (n,) where `there`) over all devices; scalar."""
    sums = torch.stack([torch.where(there, h, 0.0).sum().float(), there.sum().float()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=1)).clamp(min=0)
