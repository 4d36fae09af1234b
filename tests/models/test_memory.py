"""The memory estimate is the specification's formula, worked by hand here."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from luthier.models import Topology, count, estimate
from luthier.models.memory import Counts

# P = 1000 numbers of 4 bytes, 100 of them move, 2 layers of width 8, vocabulary 50; 3 rows of 5 tokens
COUNTS = Counts(parameters=1000, trainable=100, layers=2, width=8, vocabulary=50)


def test_the_formula_by_hand():
    memory = estimate(COUNTS, rows=3, length=5, head_chunk_tokens=10)
    assert memory.weights == 1000 * 4
    assert memory.gradients == 100 * 4
    assert memory.optimizer == 100 * 8
    assert memory.activations == 20 * 2 * 15 * 8 * 4
    assert memory.logits == 3 * 4 * 50 * 10
    assert memory.total == 4000 + 400 + 800 + 19200 + 6000
    assert memory.describe()["total"] == memory.total


def test_mixed_precision_checkpointing_and_a_chosen_share():
    half = Counts(1000, 1000, 2, 8, 50, bytes_per_number=2)
    memory = estimate(half, rows=3, length=5, trainable=10, mixed=True, checkpointing=True, head_chunk_tokens=10)
    assert (memory.weights, memory.gradients, memory.optimizer) == (2000, 20, 10 * 12)
    assert memory.activations == 3 * 2 * 15 * 8 * 2


def test_a_chunk_is_never_larger_than_the_batch_and_no_vocabulary_no_logits():
    assert estimate(COUNTS, rows=1, length=2).logits == 3 * 4 * 50 * 2
    assert estimate(Counts(10, 10, 1, 4, 0), rows=1, length=2).logits == 0


def test_counts_of_a_model(llama_config):
    model = AutoModelForCausalLM.from_config(llama_config(tie_word_embeddings=True)).to(torch.bfloat16)
    for value in model.model.layers[0].parameters():
        value.requires_grad_(False)
    found = count(model, Topology.of(model))
    total = sum(value.numel() for value in model.parameters())
    frozen = sum(value.numel() for value in model.model.layers[0].parameters())
    assert found == Counts(total, total - frozen, 2, 16, 272, bytes_per_number=2)
