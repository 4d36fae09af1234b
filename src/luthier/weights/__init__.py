"""Weights as streams of named tensors, and deltas: what a tuning changed, in a file of its own.

    weights = Weights.open("folder")            names, shapes and dtypes; tensors are read one at a time
    delta = diff("base", "tuned", "delta")      a folder; equals the difference bit for bit
    delta.apply("base", "again")                the tuned weights, bit for bit
    delta.remove("again", "base-again")         the base's, bit for bit

Nothing here knows modules or models, and nothing grows with the number of tensors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Delta": "luthier.weights.delta",
    "Weights": "luthier.weights.stream",
    "content_hash": "luthier.weights.stream",
    "diff": "luthier.weights.delta",
    "from_adapter": "luthier.weights.adapter",
    "write_weights": "luthier.weights.stream",
}
__all__ = ["Delta", "Weights", "content_hash", "diff", "from_adapter", "write_weights"]

if TYPE_CHECKING:
    from luthier.weights.adapter import from_adapter
    from luthier.weights.delta import Delta, diff
    from luthier.weights.stream import Weights, content_hash, write_weights


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
