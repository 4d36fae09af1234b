"""What the preference losses share: pairs, the log-probability of whole answers, rewards.

A pair is a prompt with a better and a worse answer (`chosen`, `rejected`). A micro-batch of n pairs is laid out as 2n
sequences, all chosen ones first, and goes through the model once. With

    lp   the SUM of an answer's token log-probabilities under the model, its end token counted, the prompt not
    rp   the same under the reference: the frozen model that this phase started from
    n    the number of its tokens,        h = lp - rp

each method is a pure function of these vectors (in its own file) and a settings object that holds exactly what the
function uses. The loss of a step is the mean over its pairs. The reference runs in evaluation mode without gradient;
where it comes from is `reference`:

    auto         adapter_off if the tuning is an adapter, else model
    adapter_off  the tuned model with its adapter switched off: no second model in memory
    model        a second model: a frozen copy of the start, or what `reference_model` names (as `model.base`)
    cached       scored once before the first step and kept beside the checkpoints: no second model while training

When not to use these: with one good answer per prompt and nothing to compare it to (`sft`). Values of different
methods mean different things; compare the rewards' accuracy, or better an evaluation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.objectives.base import Loss, Needs, Objective, ReferenceFrom
from luthier.objectives.batch import Batch, labelled, part, sequence_count, sequence_index
from luthier.objectives.logprobs import TokenLogprobs, token_logprobs


@dataclass(frozen=True)
class Pairs:
    """The answers of n pairs, each a vector (n,): chosen (`w`) and rejected (`l`).

    Attributes:
        lp_w, lp_l: summed log-probabilities under the model, float32 with gradient.
        n_w, n_l: tokens of each answer, float32, at least 1.
        rp_w, rp_l: summed log-probabilities under the reference, without gradient; zeros for a method without one.
    """

    lp_w: Tensor
    lp_l: Tensor
    n_w: Tensor
    n_l: Tensor
    rp_w: Tensor
    rp_l: Tensor


class Preference(Objective):
    """Base of the losses on pairs: fill in `compare`, or `loss` where a pair is not what counts."""

    paper: ClassVar[int | None] = 65
    learns_from: ClassVar[tuple[str, ...]] = ("pairs",)
    prompts_at_a_time: ClassVar[int] = 1
    disable_dropout: bool = True

    def needs(self) -> Needs:
        return Needs(
            learns_from=self.learns_from,
            prompts_at_a_time=self.prompts_at_a_time,
            learning_rate_scale=1 / 40,  # 5e-7 for full tuning, 5e-6 for LoRA
            without_dropout=self.disable_dropout,
        )

    @property
    def reward_scale(self) -> float:
        """What h (or lp, without a reference) is multiplied by to be called a reward."""
        raise NotImplementedError

    def compare(self, pairs: Pairs) -> Tensor:
        """(n,) float32: the loss of each pair."""
        raise NotImplementedError

    def units(self, batch: Batch) -> dict[str, float]:
        return {"pair": float(_there(answer_tokens(batch)).sum())}

    def judge(self, scored: TokenLogprobs, batch: Batch, credit: Tensor | None = None) -> Loss:
        self._refuse(credit)
        logps, tokens, _ = answer_sums(scored, batch)
        pairs, there = self._pairs(batch, logps, tokens)
        losses = torch.where(there, self.compare(pairs), 0.0)
        return Loss({"pair": losses.sum()}, {"pair": float(there.sum())}, self.rewards(pairs, there))

    def rewards(self, pairs: Pairs, there: Tensor) -> dict[str, tuple[float, float]]:
        """The metrics of every preference loss, over the pairs that are `there` (n,) bool."""
        n = float(there.sum())
        better = self.reward_scale * (pairs.lp_w - pairs.rp_w).detach()[there]
        worse = self.reward_scale * (pairs.lp_l - pairs.rp_l).detach()[there]
        return {
            "rewards/chosen": (float(better.sum()), n),
            "rewards/rejected": (float(worse.sum()), n),
            "rewards/margin": (float((better - worse).sum()), n),
            "rewards/accuracy": (float((better > worse).sum()), n),
            "logps/chosen": (float(pairs.lp_w.detach()[there].sum()), n),
            "logps/rejected": (float(pairs.lp_l.detach()[there].sum()), n),
        }

    def _pairs(self, batch: Batch, logps: Tensor, tokens: Tensor) -> tuple[Pairs, Tensor]:
        referenced = "" in self.needs().referenced
        reference = self._reference(batch).to(logps) if referenced else torch.zeros_like(logps.detach())
        columns = (half for vector in (logps, tokens.clamp(min=1).to(logps), reference) for half in vector.chunk(2))
        lp_w, lp_l, n_w, n_l, rp_w, rp_l = columns
        return Pairs(lp_w, lp_l, n_w, n_l, rp_w, rp_l), _there(tokens)

    def _reference(self, batch: Batch, prefix: str = "") -> Tensor:
        if f"{prefix}reference_logprobs" not in batch:
            raise InputError(
                f"{self.method} needs `{prefix}reference_logprobs` in its batch",
                fix="train with Luthier's loop, or put the reference's summed log-probabilities there",
            )
        return batch[f"{prefix}reference_logprobs"]

    def _refuse(self, credit: Tensor | None) -> None:
        if credit is not None:
            raise InputError(
                f"{self.method} compares whole answers and has no use for credit", fix="use objective: sft"
            )


class Referenced(Preference):
    """A preference loss that measures against a reference."""

    referenced: ClassVar[tuple[str, ...]] = ("",)
    reference: Literal["auto", "adapter_off", "model", "cached"] = "auto"
    reference_model: str | None = None

    @model_validator(mode="after")
    def _one_reference(self) -> Referenced:
        if self.reference_model is not None and self.reference == "adapter_off":
            raise ValueError("reference_model is not used with reference: adapter_off; leave one of them out")
        return self

    def needs(self) -> Needs:
        source = ReferenceFrom(self.reference, self.reference_model)
        return dataclasses.replace(super().needs(), reference=source, referenced=self.referenced)


class WithLikelihood(Preference):
    """A preference loss that also keeps the chosen answers likely: `likelihood_weight` times their token mean of
    -log p, one mean over the whole optimiser step (a unit of its own, `token`)."""

    @property
    def likelihood_weight(self) -> float:
        raise NotImplementedError

    def units(self, batch: Batch) -> dict[str, float]:
        chosen, _ = likelihood_tokens(batch).chunk(2)
        tokens = {"token": float(chosen.sum())} if self.likelihood_weight else {}
        return super().units(batch) | tokens

    def judge(self, scored: TokenLogprobs, batch: Batch, credit: Tensor | None = None) -> Loss:
        self._refuse(credit)
        logps, tokens, whole = answer_sums(scored, batch)
        pairs, there = self._pairs(batch, logps, tokens)
        losses, metrics = torch.where(there, self.compare(pairs), 0.0), self.rewards(pairs, there)
        sums, units = {"pair": losses.sum()}, {"pair": float(there.sum())}
        if self.likelihood_weight:
            nll, count = -whole.chunk(2)[0].sum(), float(likelihood_tokens(batch).chunk(2)[0].sum())
            sums, units = sums | {"token": self.likelihood_weight * nll}, units | {"token": count}
            metrics["nll"] = (float(nll.detach()), count)
        return Loss(sums, units, metrics)


def answer_tokens(batch: Batch) -> Tensor:
    """(sequences,) int64: tokens of each answer."""
    labels = batch.get("answer_labels", batch["labels"])
    return _counts(batch, labelled(labels))


def likelihood_tokens(batch: Batch) -> Tensor:
    """(sequences,) int64: tokens with a label, which are the answer's unless the prompt's are learned too."""
    return _counts(batch, labelled(batch["labels"]))


def answer_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """(sequences,) float32: summed log-probabilities of the answers of the plain part of a batch, in nats."""
    return answer_sums(token_logprobs(model, part(batch, "")), batch)[0]


def answer_sums(scored: TokenLogprobs, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Summed log-probabilities of the answers of a batch, their tokens, and the same sum over all labelled tokens.

    Returns:
        (sequences,) float32 with gradient, in nats; (sequences,) int64; (sequences,) float32. The first and the
        last differ only where `answer_labels` tell which of the labelled tokens are the answer's.
    """
    of = sequence_index(batch)[labelled(batch["labels"])]
    whole = scored.logprobs.new_zeros(sequence_count(batch)).index_add(0, of, scored.logprobs)
    tokens = answer_tokens(batch)
    if "answer_labels" not in batch:
        return whole, tokens, whole
    answer = labelled(batch["answer_labels"])[labelled(batch["labels"])]
    logps = torch.zeros_like(whole).index_add(0, of[answer], scored.logprobs[answer])
    return logps, tokens, whole


def _there(tokens: Tensor) -> Tensor:
    """(n,) bool: the pairs of which both answers have tokens; `tokens` (2n,), chosen ones first."""
    chosen, rejected = tokens.chunk(2)
    return (chosen > 0) & (rejected > 0)


def _counts(batch: Batch, chosen: Tensor) -> Tensor:
    return torch.bincount(sequence_index(batch)[chosen], minlength=sequence_count(batch))
