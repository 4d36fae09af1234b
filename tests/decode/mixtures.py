"""What tests of decoders share: tiny models under a decoder, and distributions by hand."""

from __future__ import annotations

import torch

from luthier.decode.mixture import Mixture, Opened
from luthier.decode.vocabulary import shared_vocabulary


def opened(decoder, tokenizer=None):
    """The mixture of a decoder whose models are modules."""
    models = {name: Opened(term.model, tokenizer=tokenizer) for name, term in decoder.terms().items()}
    return Mixture(decoder, models, shared_vocabulary(models))


def logprobs(model, ids):
    """(vocabulary,) float64 log-probabilities after `ids`, by a plain pass without a cache."""
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double(), -1)


def greedy(next_logprobs, prompt, count, ends=()):
    """Token by token by hand: `next_logprobs(ids)` -> (vocabulary,)."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(next_logprobs(ids).argmax()))
        if ids[-1] in ends:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]
