"""A stream with its cache says what the model says of the whole text at once."""

from __future__ import annotations

import pytest
import torch
from tests.decode.mixtures import logprobs

from luthier.decode.streams import open_stream

WRITTEN = [16, 31, 24, 21, 5]


@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [8], [9, 10, 11, 12]]])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mamba"])
def test_every_next_token_is_that_of_a_plain_pass(make_model, name, prompts):
    model = make_model(name)
    stream = open_stream(model, prompts)
    for at, token in enumerate(WRITTEN):
        said = torch.log_softmax(stream.logits().double(), -1)
        for row, prompt in zip(said, prompts, strict=True):
            torch.testing.assert_close(row, logprobs(model, [*prompt, *WRITTEN[:at]]), rtol=0, atol=1e-4)
        stream.feed(torch.full((len(prompts),), token))
