"""The tiny language model that travels inside the package: 1 million parameters, a real pre-trained start.

    folder()     the Hugging Face folder; in a recipe: `model: {base: "package:luthier/worlds/tiny-lm"}`
    record()     what it was trained on, how long, and what it can do, as measured by the training script
    verify()     refuses weights or a tokenizer whose checksum differs from the record

A Llama of 4 blocks, 128 wide, with a byte-level vocabulary of 1,536 and single digits, pre-trained from nothing by
`scripts/pretrain_tiny.py` on scripture and on four arithmetic skills (`luthier.worlds.arithmetic.LEARNED`). It reads
and writes in seconds on one core, so the quickstart, the tests and the proofs can show what only a pre-trained model
can show: something gained, and something forgotten. It is of no other use: it knows nothing of the world.
"""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from luthier.errors import InputError

RECORD = "training.json"


def folder() -> Path:
    """The folder with config.json, model.safetensors, tokenizer.json and the record."""
    return Path(str(resources.files("luthier.worlds"))) / "tiny-lm"


def record() -> dict[str, Any]:
    """The training script's record: `model`, `data`, `training`, `claims` (skill -> percent right) and `sha256`."""
    path = folder() / RECORD
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            "the tiny model is not there", where=str(path), fix="run scripts/pretrain_tiny.py or reinstall luthier"
        ) from None


def verify() -> dict[str, str]:
    """File name -> SHA-256 of each recorded file; `InputError` if one is missing or differs."""
    sums: dict[str, str] = record()["sha256"]
    for name, expected in sums.items():
        path = folder() / name
        if not path.is_file():
            raise InputError("a file of the tiny model is missing", where=str(path), fix="reinstall luthier")
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise InputError("the file differs from the one in training.json", where=str(path), fix="reinstall luthier")
    return sums
