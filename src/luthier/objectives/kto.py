"""Kahneman-Tversky optimisation (KTO): judge each answer by itself, against how far the model has moved in general.

    desirable     desirable_weight   (1 - sigmoid(beta (h - z0)))
    undesirable   undesirable_weight (1 - sigmoid(beta (z0 - h)))
    z0 = max(0, mean of h over mismatched prompts and answers), without gradient

The loss is the mean over answers. A pair is one desirable and one undesirable answer. z0 estimates the distance of
model and reference on answers that were not asked for. Row i of a micro-batch (all chosen, then all rejected) is
mismatched with the answer of row i - 1; where the two have the same prompt, of the next row with another prompt. It is
a mean over the micro-batch and over devices, so unlike all others here this loss depends a little on how a step is cut;
a micro-batch with one prompt only has nothing to mismatch and is refused.

When not to use it: on few rows per micro-batch (z0 is then mostly noise), or where memory for a second pass over the
micro-batch is missing.

Ethayarajh et al. 2024; compared in Saeidi et al. 2024. Where prompts repeat we take the next row; TRL does not.
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
from luthier.objectives.base import IGNORED, Batch, Loss, part
from luthier.objectives.preference import Referenced, answer_logprobs, answer_tokens


class Kto(Referenced):
    """Sigmoid loss of single answers against a common zero."""

    method: Literal["kto"] = "kto"
    referenced: ClassVar[tuple[str, ...]] = ("", "mismatched_")
    smallest_batch: ClassVar[int] = 2
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

    def arrange(self, examples: Sequence[tuple[Encoded, Encoded]]) -> dict[str, list[Encoded]]:
        rows = super().arrange(examples)[""]
        return {"": rows, "mismatched_": mismatched(rows)}

    def units(self, batch: Batch) -> dict[str, float]:
        return {"answer": float((answer_tokens(batch) > 0).sum())}

    def loss(self, model: nn.Module, batch: Batch, credit: Tensor | None = None) -> Loss:
        self._refuse(credit)
        with torch.no_grad():
            other = part(batch, "mismatched_")
            logps, tokens, _ = answer_logprobs(model, other)
            z0 = _zero(logps - batch["mismatched_reference_logprobs"].to(logps), tokens > 0)
        logps, tokens, _ = answer_logprobs(model, batch)
        pairs, there = self._pairs(batch, logps, tokens)
        desirable = torch.arange(len(logps), device=logps.device) < len(logps) // 2
        losses = kto(
            logps,
            batch["reference_logprobs"].to(logps),
            desirable,
            z0,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        present = tokens > 0
        metrics = self.rewards(pairs, there) | {"z0": (float(z0) * float(there.sum()), float(there.sum()))}
        return Loss({"answer": torch.where(present, losses, 0.0).sum()}, {"answer": float(present.sum())}, metrics)


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


def mismatched(rows: Sequence[Encoded]) -> list[Encoded]:
    """Each row's prompt with the answer of the row before it that has another prompt (see above for the order)."""
    split = [_split(row) for row in rows]
    return [_joined(split[i][0], split[_other(split, i)][1]) for i in range(len(rows))]


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


def _joined(prompt: list[int], answer: list[int]) -> Encoded:
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def _zero(h: Tensor, there: Tensor) -> Tensor:
    """max(0, mean of h (n,) where `there`) over all devices; scalar."""
    sums = torch.stack([torch.where(there, h, 0.0).sum().float(), there.sum().float()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=1)).clamp(min=0)
