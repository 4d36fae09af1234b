"""Tiny random pairs, and the tokenizer of single letters."""

from __future__ import annotations

import pytest
from tests.decode.conftest import make_model, tokenizer

from luthier.analyze import Pair

__all__ = ["make_model", "make_pair", "tokenizer"]


@pytest.fixture(scope="session")
def make_pair(make_model, tokenizer):
    """Makes a pair of tiny random models of one architecture."""

    def make(name="llama", **changes):
        return Pair(make_model(name, 0, **changes), make_model(name, 1, **changes), tokenizer)

    return make
