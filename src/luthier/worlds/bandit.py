"""A bandit with linear features: prompts, answers of one token, a true reward, and pairs that a noisy judge labelled.

    world = Bandit(seed=0)
    pairs = world.pairs(100)                     the first 100 of one endless sequence: small sets lie in large ones
    world.gain(weights)                          expected reward on held-out prompts, beyond the reference's

40 prompts with 30 answers each; every answer has 16 features drawn from N(0, 1), and its true reward is their product
with w ~ N(0, 1) / 4, so rewards have a spread of about 1. The reference is a softmax over logits from N(0, 1). A policy
is the reference with `features @ weights` added to its logits; weights of zero are the reference itself. Pairs are two
different answers to one of the first 30 prompts, drawn from the reference; which is called better follows
Bradley-Terry: P(a over b) = sigmoid(2 (reward of a - reward of b)). What was learned is judged on the other 10 prompts,
without sampling: the expectation is a sum over 30 answers.

Preference losses can be compared here in seconds, because they see nothing but log-probabilities of answers. What the
world cannot show is length: every answer is one token long.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from luthier.errors import InputError
from luthier.worlds.parts import checked_count, checked_seed

PROMPTS, TRAINING_PROMPTS, ANSWERS, FEATURES = 40, 30, 30, 16
SCALE = 2.0  # how sure the judge is


@dataclass(frozen=True)
class BanditPairs:
    """Pairs as indices, each (n,) int64: the prompt, the answer called better, the other one."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class Bandit:
    """One world; equal seeds give equal worlds and pairs."""

    seed: int = 0

    def __post_init__(self) -> None:
        checked_seed(self.seed)

    @cached_property
    def features(self) -> Tensor:
        """(prompts, answers, features) float32."""
        return torch.randn(PROMPTS, ANSWERS, FEATURES, generator=self._generator(1))

    @cached_property
    def rewards(self) -> Tensor:
        """(prompts, answers) float32, the true rewards."""
        return self.features @ (torch.randn(FEATURES, generator=self._generator(2)) / 4)

    @cached_property
    def reference(self) -> Tensor:
        """(prompts, answers) float32 log-probabilities of the reference; each row sums to 1 as probabilities."""
        return torch.randn(PROMPTS, ANSWERS, generator=self._generator(3)).log_softmax(-1)

    def pairs(self, count: int) -> BanditPairs:
        """The first `count` pairs."""
        generator = self._generator(4)
        drawn = [self._pair(generator) for _ in range(checked_count(count))]
        return BanditPairs(*torch.tensor(drawn, dtype=torch.int64).unbind(1))

    def logprobs(self, weights: Tensor) -> Tensor:
        """(prompts, answers) log-probabilities of the policy with `weights` (features,)."""
        if weights.shape != (FEATURES,):
            raise InputError(f"expected weights of shape ({FEATURES},), got {tuple(weights.shape)}", where="weights")
        return (self.reference + self.features @ weights).log_softmax(-1)

    def gain(self, weights: Tensor) -> float:
        """Expected reward of the policy minus that of the reference, mean over the held-out prompts."""
        more = self.logprobs(weights.detach()).exp() - self.reference.exp()
        return float((more * self.rewards)[TRAINING_PROMPTS:].sum(-1).mean())

    def _pair(self, generator: torch.Generator) -> tuple[int, int, int]:
        prompt = int(torch.randint(TRAINING_PROMPTS, (), generator=generator))
        first, second = torch.multinomial(self.reference[prompt].exp(), 2, generator=generator).tolist()
        sure = torch.sigmoid(SCALE * (self.rewards[prompt, first] - self.rewards[prompt, second]))
        if torch.rand((), generator=generator) < sure:
            return prompt, first, second
        return prompt, second, first

    def _generator(self, part: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 10 + part)
