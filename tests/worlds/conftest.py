"""Fixtures of the worlds: the pre-training script as a module, and the tiny model loaded once."""

from __future__ import annotations

import importlib

import pytest


@pytest.fixture(scope="session")
def script():
    return importlib.import_module("pretrain_tiny")


@pytest.fixture(scope="session")
def tiny_lm():
    """(model, tokenizer) of the shipped folder, on one thread."""
    transformers = pytest.importorskip("transformers")
    from luthier.worlds import tiny

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder(), dtype="auto").eval()
    return model, transformers.AutoTokenizer.from_pretrained(tiny.folder())
