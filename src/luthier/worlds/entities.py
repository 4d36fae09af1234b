"""Entities: a large model knows facts that a small one does not, and tuning teaches a manner of answering.

300 entities with Zipf frequencies, each with one of 40 attributes, drawn at random. Pre-training texts state facts in
plain words, in 30 % of them with a mark before the attribute:

    BOS e IS [MARK] a END            BOS e IS [MARK] a AND e'           about half of each

A tuned model is asked in another format and has to answer in one of its own:

    Q e ? A  ->  MARK a END          taught on the entities of every third rank, 100 of them; 200 stay unseen

So manner and knowledge can be told apart: `format` is a mark, an attribute and the end, `fact` the right attribute.
With `sums`, that share of all texts are sums modulo 10 instead, a second skill with a mark and a format of its own:

    BOS x PLUS y IS [SO] z END       Q x PLUS y ? A  ->  SO z END       taught on every third of the 100 sums

    world = Entities(seed=0)
    big, small = world.pretrained("big"), world.pretrained("small")
    tuned = world.tuned(small, world.lesson("fact"), learning_rate=1e-3)
    world.score("fact", answers)     of the prompts world.prompts("fact", "own") or "plain", in the order of `unseen`

Models are Llamas of 3 blocks, width 96 (0.4 million parameters), and of 1 block, width 12 (6 thousand). Everything is
drawn from the seed; both are made in about half a minute on one core.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.worlds.parts import checked_seed

ENTITIES, ATTRIBUTES, DIGITS = 300, 40, 10
MARKS = ("BOS", "IS", "MARK", "END", "AND", "Q", "?", "A")
BOS, IS, MARK, END, AND, Q, ASK, A = range(len(MARKS))
ENTITY = len(MARKS)
ATTRIBUTE = ENTITY + ENTITIES
PLUS = ATTRIBUTE + ATTRIBUTES
SO = PLUS + 1
DIGIT = SO + 1
VOCABULARY = DIGIT + DIGITS
IGNORED = -100
LONGEST = 9
Skill = Literal["fact", "sum"]
Size = Literal["big", "small"]
Lesson = list[tuple[list[int], list[int]]]  # (prompt, answer) each

# blocks, width, heads, width inside the feed-forward; steps and rate of the pre-training
SIZES: dict[str, tuple[int, int, int, int, int, float]] = {
    "big": (3, 96, 4, 256, 1200, 2e-3),
    "small": (1, 12, 2, 32, 300, 5e-3),
}


@dataclass(frozen=True)
class Entities:
    """All facts, texts and models of one seed.

    Attributes:
        seed: of everything that is drawn.
        sums: share of pre-training texts that are sums, 0 to 1.
    """

    seed: int = 0
    sums: float = 0.0

    def __post_init__(self) -> None:
        checked_seed(self.seed)

    @cached_property
    def attribute(self) -> list[int]:
        """The attribute (0 to 39) of each entity; entities are numbered by frequency, the most frequent is 0."""
        return np.random.default_rng([self.seed, 0]).integers(0, ATTRIBUTES, ENTITIES).tolist()

    @cached_property
    def frequency(self) -> np.ndarray:
        """(300,) float64, in proportion to 1 / rank; they add up to 1."""
        found = 1 / np.arange(1, ENTITIES + 1)
        return found / found.sum()

    def texts(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` pre-training texts as ids and labels, (count, 9) int64 each, filled up on the right."""
        entity, other = rng.choice(ENTITIES, (2, count), p=self.frequency)
        digits = rng.integers(0, DIGITS, (count, 2))
        marked, ends, sums = rng.random(count) < 0.3, rng.random(count) < 0.5, rng.random(count) < self.sums
        rows = []
        for i in range(count):
            x, y = digits[i].tolist()
            subject, value, mark = (
                ([DIGIT + x, PLUS, DIGIT + y], DIGIT + (x + y) % DIGITS, SO)
                if sums[i]
                else ([ENTITY + int(entity[i])], ATTRIBUTE + self.attribute[entity[i]], MARK)
            )
            after = [END] if ends[i] else [AND, ENTITY + int(other[i])]
            rows.append([BOS, *subject, IS, *([mark] if marked[i] else []), value, *after])
        return _filled([([], row) for row in rows])

    def pretrained(self, size: Size, *, steps: int | None = None) -> LlamaForCausalLM:
        """A model that has read texts (AdamW, batches of 64, constant rate), in evaluation mode.

        `steps`: how many, 1,200 for the big and 300 for the small one if not given.
        """
        *shape, usual, rate = SIZES[size]
        model = _new_model(self.seed, *(int(n) for n in shape))
        rng = np.random.default_rng([self.seed, 1])
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        model.train()
        for _ in range(usual if steps is None else steps):
            _update(model, optimizer, *self.texts(64, rng))
        return model.eval()

    def topics(self, skill: Skill) -> tuple[list[int], list[int]]:
        """(taught, unseen): entities by rank, or sums as 10 x + y; every third is taught."""
        if skill == "fact":
            every = list(range(ENTITIES))
        else:
            every = np.random.default_rng([self.seed, 2]).permutation(DIGITS * DIGITS).tolist()
        return every[::3], [topic for i, topic in enumerate(every) if i % 3]

    def prompt(self, skill: Skill, topic: int, how: Literal["plain", "own"]) -> list[int]:
        """`plain` as texts begin, for models that were not tuned; `own` is what tuned models are asked."""
        x, y = divmod(topic, DIGITS)
        subject = [ENTITY + topic] if skill == "fact" else [DIGIT + x, PLUS, DIGIT + y]
        return [BOS, *subject, IS] if how == "plain" else [Q, *subject, ASK, A]

    def prompts(self, skill: Skill, how: Literal["plain", "own"]) -> list[list[int]]:
        """Of all unseen topics."""
        return [self.prompt(skill, topic, how) for topic in self.topics(skill)[1]]

    def value(self, skill: Skill, topic: int) -> int:
        """The token that answers."""
        return ATTRIBUTE + self.attribute[topic] if skill == "fact" else DIGIT + sum(divmod(topic, DIGITS)) % DIGITS

    def lesson(self, skill: Skill, topics: Sequence[int] | None = None) -> Lesson:
        """Questions with answers in the skill's format, of the taught topics or of these."""
        mark = MARK if skill == "fact" else SO
        return [
            (self.prompt(skill, topic, "own"), [mark, self.value(skill, topic), END])
            for topic in (self.topics(skill)[0] if topics is None else topics)
        ]

    def tuned(
        self, base: LlamaForCausalLM, lesson: Lesson, *, learning_rate: float, steps: int = 150
    ) -> LlamaForCausalLM:
        """A copy of `base` taught `lesson` (AdamW, batches of 64 drawn from it, loss on the answers alone)."""
        model = copy.deepcopy(base).train()
        rng = np.random.default_rng([self.seed, 3])
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
        for _ in range(steps):
            _update(model, optimizer, *_filled([lesson[i] for i in rng.integers(0, len(lesson), 64)]))
        return model.eval()

    def score(self, skill: Skill, answers: Sequence[Sequence[int]]) -> dict[str, list[bool]]:
        """For answers to the unseen topics, in their order and without the end token, whether each is right.

        `format`: a mark and a value, then the end; `fact`: the first value in the answer is the right one; `both`.
        An answer that did not end by itself has its third token still in it.
        """
        mark, first, count = (MARK, ATTRIBUTE, ATTRIBUTES) if skill == "fact" else (SO, DIGIT, DIGITS)
        values = range(first, first + count)
        found: dict[str, list[bool]] = {"format": [], "fact": [], "both": []}
        for topic, answer in zip(self.topics(skill)[1], answers, strict=True):
            said = next((token for token in answer if token in values), None)
            formed = len(answer) == 2 and answer[0] == mark and answer[1] in values
            right = said == self.value(skill, topic)
            found["format"].append(formed)
            found["fact"].append(right)
            found["both"].append(formed and right)
        return found


def tokenizer() -> Any:
    """One word a token; END ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*MARKS, *(f"e{i}" for i in range(ENTITIES)), *(f"a{i}" for i in range(ATTRIBUTES)), "PLUS", "SO"]
    words += [str(digit) for digit in range(DIGITS)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="BOS", eos_token="END", pad_token="END")


def _filled(rows: Lesson) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, filled up on the right; labels are the answers."""
    ids = [[*prompt, *answer, *[END] * (LONGEST - len(prompt) - len(answer))] for prompt, answer in rows]
    labels = [[IGNORED] * len(p) + [*a, *[IGNORED] * (LONGEST - len(p) - len(a))] for p, a in rows]
    return torch.tensor(ids), torch.tensor(labels)


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, labels: torch.Tensor) -> None:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _new_model(seed: int, blocks: int, width: int, heads: int, inner: int) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                intermediate_size=inner,
                num_hidden_layers=blocks,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=16,
                initializer_range=0.02,
                tie_word_embeddings=True,
                bos_token_id=BOS,
                eos_token_id=END,
                pad_token_id=END,
            )
        )
