"""A stream gives what a plain pass over everything gives, however it came there."""

from __future__ import annotations

import pytest
import torch
from tests.decode.mixtures import logprobs

from luthier.decode.streams import open_stream

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
MORE = [[4, 7, 9, 20], [5, 5, 6, 7], [30, 4, 4, 9]]
KINDS = ["llama", "gpt2", "bloom", "mamba", "t5", "bart"]


def plain(model, prompt, new):
    """(vocabulary,) float64: a pass without a cache."""
    if not model.config.is_encoder_decoder:
        return logprobs(model, [*prompt, *new])
    ids = torch.tensor([[model.config.decoder_start_token_id, *new]])
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt]), decoder_input_ids=ids).logits[0, -1].double().log_softmax(-1)


def close(stream, model, rows):
    found = stream.logits().double().log_softmax(-1)
    wanted = torch.stack([plain(model, prompt, new) for prompt, new in rows])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # float32, other orders of adding up


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_fed_forked_and_dropped_are_as_if_read_at_once(make_model, kind, cached):
    model = make_model(kind, 3)
    stream = open_stream(model, PROMPTS, use_cache=cached)
    for at in range(4):
        close(stream, model, [(prompt, new[:at]) for prompt, new in zip(PROMPTS, MORE, strict=True)])
        stream.feed(torch.tensor([new[at] for new in MORE]))
    fork = stream.fork(2)
    fork.reorder(torch.tensor([0, 3, 4, 4]))  # the second prompt's first copy goes, the third's is there twice
    fork.feed(torch.tensor([21, 22, 23, 24]))
    fork.logits()
    fork.feed(torch.tensor([9, 9, 9, 9]))
    rows = [(PROMPTS[i], [*MORE[i], token, 9]) for i, token in zip((0, 1, 2, 2), (21, 22, 23, 24), strict=True)]
    close(fork, model, rows)
    close(stream, model, list(zip(PROMPTS, MORE, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_room_is_what_the_context_leaves(make_model, kind):
    model = make_model(kind)
    limit = {"llama": 48, "gpt2": 48, "bart": 48}.get(kind)
    room = open_stream(model, PROMPTS).room
    if limit is None:
        assert room is None
    elif model.config.is_encoder_decoder:
        assert room.tolist() == [limit - 1] * 3
    else:
        assert room.tolist() == [limit - len(prompt) for prompt in PROMPTS]
