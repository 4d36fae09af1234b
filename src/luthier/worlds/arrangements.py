"""Arrangements: a language small enough to know a model's expected reward exactly, for preference losses on a real LM.

A prompt is four different symbols of eight, and a separator; an answer is some of them in some order, and an end token:

    5 0 7 2 |        an answer: 0 2 7 .        the best one: 0 2 5 7 .

The reward of an answer is the share of the six pairs of the prompt's symbols that it has in rising order: complete and
sorted is 1, a single symbol 0, and so is anything that is not made of the prompt's symbols. A prompt has 64 valid
answers, so the expected reward of a model is a sum over them and nothing is sampled. Answers differ in length, which
the bandit (`luthier.worlds.bandit`) cannot show.

`pretrained` makes the start: a Llama (2 blocks, width 64) that has seen answers of every length in any order, half of
them of other symbols than the prompt's. It can spell and knows neither the task nor what is preferred.
`demonstrations` are valid answers for supervised tuning; `pairs` are two different valid answers each, labelled by
Bradley-Terry on 6 times the difference of their rewards. A fifth of all prompts is held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.data.roles import CHOSEN, PLAIN, REJECTED
from luthier.worlds.parts import checked_count, checked_seed

SYMBOLS, SHOWN = 8, 4
SEPARATOR, END, VOCABULARY = SYMBOLS, SYMBOLS + 1, 16
LONGEST = 2 * SHOWN + 2
IGNORED = -100
SCALE = 6.0  # how sure the judge is
Answer = tuple[int, ...]


class AnswerRows:
    """Prompts with answers as encoded examples; of a pair, the chosen answer comes first and both have one `row`.

    Args:
        rows: (prompt, answer) each; the loss is on the answer and its end token.
        together: how many rows belong together, 1 or 2.
    """

    def __init__(self, rows: Sequence[tuple[Answer, Answer]], together: int = 1):
        self._rows = list(rows)
        self.row = np.arange(len(self._rows)) // together
        self.role = np.array(([CHOSEN, REJECTED] if together == 2 else [PLAIN]) * (len(self._rows) // together))
        self.lengths = np.array([len(prompt) + len(answer) + 2 for prompt, answer in self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        prompt, answer = self._rows[index]
        learned = [*answer, END]
        return {"input_ids": [*prompt, SEPARATOR, *learned], "labels": [IGNORED] * (len(prompt) + 1) + learned}


@dataclass(frozen=True)
class Arrangements:
    """All prompts, answers and pairs of one seed."""

    seed: int = 0

    def __post_init__(self) -> None:
        checked_seed(self.seed)

    @cached_property
    def prompts(self) -> tuple[list[Answer], list[Answer]]:
        """(training, held out): all 1680 ordered choices of four symbols, a fifth of them held out."""
        every = list(permutations(range(SYMBOLS), SHOWN))
        order = np.random.default_rng([self.seed, 0]).permutation(len(every))
        shuffled = [every[i] for i in order]
        cut = len(every) // 5
        return shuffled[cut:], shuffled[:cut]

    def demonstrations(self, count: int) -> AnswerRows:
        """The first `count` prompts with a valid answer each, the better of two as the judge sees it."""
        rng = np.random.default_rng([self.seed, 1])
        drawn = [self._pair(rng) for _ in range(checked_count(count))]
        return AnswerRows([(prompt, better) for prompt, better, _ in drawn])

    def pairs(self, count: int) -> AnswerRows:
        """The first `count` pairs, two rows each: small sets lie in large ones."""
        rng = np.random.default_rng([self.seed, 2])
        drawn = [self._pair(rng) for _ in range(checked_count(count))]
        rows = [(prompt, answer) for prompt, better, worse in drawn for answer in (better, worse)]
        return AnswerRows(rows, together=2)

    def pretrained(self, steps: int = 300) -> LlamaForCausalLM:
        """A model that spells (AdamW, rate 3e-3 falling to 0, batches of 128), in evaluation mode."""
        model = _new_model(self.seed)
        rng = np.random.default_rng([self.seed, 3])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        model.train()
        for _ in range(steps):
            ids, labels = _padded([self._loose(rng) for _ in range(128)])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        return model.eval()

    @torch.no_grad()
    def judge(self, model: nn.Module, count: int = 40) -> tuple[float, float]:
        """(expected reward, probability of a valid answer) of `model`, means over the first `count` held-out prompts.

        Both are sums over all 64 valid answers of a prompt; every other answer has reward 0.
        """
        prompts = self.prompts[1][:count]
        rows = [(prompt, answer) for prompt in prompts for answer in valid(prompt)]
        probabilities = _answer_logprobs(model, rows).exp()
        rewards = torch.tensor([reward(prompt, answer) for prompt, answer in rows])
        return float((probabilities * rewards).sum()) / count, float(probabilities.sum()) / count

    def _pair(self, rng: np.random.Generator) -> tuple[Answer, Answer, Answer]:
        """A training prompt with two different valid answers, the one that the judge prefers first."""
        prompt = self.prompts[0][rng.integers(len(self.prompts[0]))]
        first = second = _draw(rng, prompt)
        while second == first:
            second = _draw(rng, prompt)
        sure = 1 / (1 + np.exp(-SCALE * (reward(prompt, first) - reward(prompt, second))))
        return (prompt, first, second) if rng.random() < sure else (prompt, second, first)

    def _loose(self, rng: np.random.Generator) -> tuple[Answer, Answer]:
        """A training prompt with an answer of its own symbols or, as often, of others."""
        prompt = self.prompts[0][rng.integers(len(self.prompts[0]))]
        own = rng.random() < 0.5
        return prompt, _draw(rng, prompt if own else tuple(range(SYMBOLS)))


def valid(prompt: Answer) -> list[Answer]:
    """All 64 answers made of the prompt's symbols, each symbol at most once."""
    return [answer for n in range(1, SHOWN + 1) for answer in permutations(prompt, n)]


def reward(prompt: Answer, answer: Answer) -> float:
    """The share of the six pairs of `prompt`'s symbols that `answer` has in rising order; 0 if it is not valid."""
    if len(set(answer)) < len(answer) or not set(answer) <= set(prompt):
        return 0.0
    rising = sum(a < b for i, a in enumerate(answer) for b in answer[i + 1 :])
    return rising / (SHOWN * (SHOWN - 1) / 2)


def _draw(rng: np.random.Generator, symbols: Answer) -> Answer:
    """One to four of `symbols` in random order; every length is as likely."""
    return tuple(int(s) for s in rng.permutation(symbols)[: rng.integers(1, SHOWN + 1)])


def _padded(rows: Sequence[tuple[Answer, Answer]]) -> tuple[Tensor, Tensor]:
    """(rows, 10) int64 ids and labels; what follows the end token is never looked at."""
    encoded = AnswerRows(rows)
    ids = torch.full((len(rows), LONGEST), END, dtype=torch.int64)
    labels = torch.full((len(rows), LONGEST), IGNORED, dtype=torch.int64)
    for number in range(len(rows)):
        example = encoded[number]
        ids[number, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
        labels[number, : len(example["labels"])] = torch.tensor(example["labels"])
    return ids, labels


def _answer_logprobs(model: nn.Module, rows: Sequence[tuple[Answer, Answer]]) -> Tensor:
    """(rows,) float32 summed log-probabilities of the answers, end tokens included."""
    ids, labels = _padded(rows)
    caller: Any = model
    logprobs = caller(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    there = labels[:, 1:] != IGNORED
    chosen = logprobs.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(there, chosen, 0.0).sum(-1)


def _new_model(seed: int) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=16,
                initializer_range=0.05,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
