"""Fixtures of the worlds: the pre-training script as a module, and the tiny model loaded once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "pretrain_tiny.py"
    spec = importlib.util.spec_from_file_location("pretrain_tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_lm():
    """(model, tokenizer) of the shipped folder, on one thread."""
    transformers = pytest.importorskip("transformers")
    from luthier.worlds import tiny

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder(), dtype="auto").eval()
    return model, transformers.AutoTokenizer.from_pretrained(tiny.folder())
