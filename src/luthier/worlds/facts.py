"""The facts world: a tiny decoder that knows 840 facts by heart and is then taught 120 more. What does it forget?

120 subjects, 8 relations and 60 objects; every (subject, relation) has one object, drawn at random, so nothing can be
guessed and everything must be remembered. A fact is a row of three tokens, [subject, relation, object], with the loss
on the object. `pretrained` trains a Llama (4 blocks, width 64, untied) on some relations until it knows them all; the
others are new to it. Several proofs share it: how much of the old is left after learning the new, by which tuning.

    world = Facts(seed=0)
    model = world.pretrained(relations=range(7))
    examples = world.examples(range(7, 8))                what a `Loop` takes
    world.recall(model, range(7))                         (share right, mean loss in nats)

Everything is drawn from the seed, nothing is downloaded, and a proof's model is made in a few seconds on one core.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

SUBJECTS, RELATIONS, OBJECTS = 120, 8, 60
VOCABULARY = 192  # 188 in use
IGNORED = -100


class FactRows:
    """Facts as encoded examples: `input_ids` of three tokens, labels on the last."""

    def __init__(self, rows: Sequence[Sequence[int]]):
        self.rows = [list(row) for row in rows]
        self.lengths = np.full(len(self.rows), 3)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        return {"input_ids": row, "labels": [IGNORED, IGNORED, row[2]]}


@dataclass(frozen=True)
class Facts:
    """All facts of one seed."""

    seed: int = 0

    def triples(
        self, relations: Iterable[int], subjects: Sequence[int] = range(SUBJECTS)
    ) -> list[tuple[int, int, int]]:
        """Token ids (subject, relation, object) of all facts of `relations`, one for each of `subjects`."""
        objects = np.random.default_rng([self.seed, 1]).integers(0, OBJECTS, (RELATIONS, SUBJECTS))
        first_object = SUBJECTS + RELATIONS
        return [(s, SUBJECTS + r, first_object + int(objects[r, s])) for r in relations for s in subjects]

    def examples(self, relations: Iterable[int], subjects: Sequence[int] = range(SUBJECTS)) -> FactRows:
        """These facts as rows to train on."""
        return FactRows(self.triples(relations, subjects))

    def pretrained(self, relations: Iterable[int] = range(7), *, blocks: int = 4, steps: int = 900) -> LlamaForCausalLM:
        """A model that knows the facts of `relations` (AdamW, rate 3e-3, batches of 256), in evaluation mode."""
        model = new_model(self.seed, blocks)
        rows = torch.tensor(self.triples(relations))
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        model.train()
        for _ in range(steps):
            chosen = rows[torch.randint(0, len(rows), (256,), generator=generator)]
            loss = F.cross_entropy(model(input_ids=chosen[:, :2], use_cache=False).logits[:, -1], chosen[:, 2])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return model.eval()

    @torch.no_grad()
    def recall(
        self, model: nn.Module, relations: Iterable[int], subjects: Sequence[int] = range(SUBJECTS)
    ) -> tuple[float, float]:
        """(share of these facts whose most probable next token is the right one, mean loss in nats)."""
        rows = torch.tensor(self.triples(relations, subjects))
        caller: Any = model
        logits = caller(input_ids=rows[:, :2], use_cache=False).logits[:, -1].float()
        right = (logits.argmax(-1) == rows[:, 2]).float().mean()
        return float(right), float(F.cross_entropy(logits, rows[:, 2]))


def new_model(seed: int, blocks: int = 4) -> LlamaForCausalLM:
    """An untrained model of this world: weights N(0, 0.05)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=blocks,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=8,
                initializer_range=0.05,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
