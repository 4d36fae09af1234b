"""A stream against the model read anew at every step."""

from __future__ import annotations

import pytest
import torch
from tests.decode.conftest import KINDS

from luthier.decode.streams import open_stream

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_changes_nothing_however_long_the_text(make_model, kind):
    model = make_model(kind)
    with_cache, without = (open_stream(model, PROMPTS, use_cache=cached) for cached in (True, False))
    for _ in range(6):
        said = without.logits()
        torch.testing.assert_close(with_cache.logits(), said, atol=1e-4, rtol=1e-4)
        with_cache.feed(said.argmax(-1))
        without.feed(said.argmax(-1))
