"""The one sampler: what turns log-probabilities, of one model or of a mixture, into the next token.

    sampler = Sampler(temperature=0.7, top_p=0.95, seed=3)
    processors = sampler.processors(prompts, numbers)          for transformers' loop, which then takes the largest

What changes or cuts the distribution are transformers' own processors, in its order: repetition penalty, temperature,
top-k, top-p, min-p. What draws from it is ours: noise comes from a generator per prompt, seeded by (seed, number of the
prompt), never from the global state: adding Gumbel noise to log-probabilities and taking the largest is sampling from
them (Gumbel 1954; Maddison, Tarlow and Minka 2014, arXiv 1411.0030). So the same prompt in another batch draws the same
words. Temperature 0 takes the most probable token, and draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from luthier.errors import InputError


class Sampler(BaseModel):
    """Settings of the sampler.

    Attributes:
        temperature: 0 takes the most probable token, 1 samples from the distribution as it is.
        top_k: only the so many most probable tokens; 0 is all.
        top_p: only the smallest set of tokens whose probabilities add up to this.
        min_p: only tokens of at least this share of the largest probability; 0 is all.
        repetition_penalty: above 1 makes tokens that the prompt or the answer holds less probable (CTRL).
        seed: of the draws.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    seed: int = 0

    @property
    def shapers(self) -> LogitsProcessorList:
        """What changes or cuts the distribution, without the draw; only penalties at temperature 0."""
        found: list[LogitsProcessor] = []
        if self.temperature > 0:
            if self.temperature != 1:
                found.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k:
                found.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                found.append(TopPLogitsWarper(float(self.top_p)))
            if self.min_p:
                found.append(MinPLogitsWarper(self.min_p))
        return LogitsProcessorList(found)

    def processors(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> LogitsProcessorList:
        """For the rows of a batch: their prompts (token ids, for the penalty) and numbers (for the seeds)."""
        found = LogitsProcessorList()
        if self.repetition_penalty != 1:
            found.append(Penalty(self.repetition_penalty, prompts))
        found.extend(self.shapers)
        if self.temperature > 0:
            found.append(Noise(self.seed, numbers))
        return found


class Numbers(LogitsProcessor):
    """Refuses scores that are not numbers: a model with broken weights would otherwise write some token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise InputError("the next token's scores are not numbers", fix="look for NaN or infinity in the weights")
        return scores


class Penalty(LogitsProcessor):
    """transformers' repetition penalty over prompt and answer; padding, of which it does not know, left aside."""

    def __init__(self, penalty: float, prompts: Sequence[Sequence[int]]):
        self.penalty, self.prompts = RepetitionPenaltyLogitsProcessor(penalty), prompts
        self.width: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.width is None:  # the first call sees the prompts, padded, or an encoder-decoder's start
            self.width = input_ids.shape[1]
        rows = []
        for prompt, ids, row in zip(self.prompts, input_ids, scores, strict=True):
            seen = torch.cat([torch.tensor(prompt, device=ids.device, dtype=ids.dtype), ids[self.width :]])
            rows.append(self.penalty(seen[None], row[None])[0])
        return torch.stack(rows)


class Noise(LogitsProcessor):
    """Turns the most probable token into a sample: Gumbel noise from a generator per prompt."""

    def __init__(self, seed: int, numbers: Sequence[int]):
        self.seed, self.numbers = seed, numbers
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.generators:
            self.generators = [generator_of(self.seed, number, scores.device) for number in self.numbers]
        logprobs = torch.log_softmax(scores.float(), dim=-1)
        rows = zip(logprobs, self.generators, strict=True)
        noise = torch.stack([torch.empty_like(row).exponential_(generator=generator) for row, generator in rows])
        return logprobs - noise.log()


def generator_of(seed: int, number: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one prompt."""
    return torch.Generator(device=device).manual_seed((seed * 1_000_003 + number) % 2**63)
