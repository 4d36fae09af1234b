"""Weights as streams of named tensors, and deltas: what a tuning changed, in a file of its own.

    weights = Weights.open("folder")            names, shapes and dtypes; tensors are read one at a time
    delta = diff("base", "tuned", "delta")      a folder; equals the difference bit for bit
    delta.apply("base", "again")                the tuned weights, bit for bit
    delta.remove("again", "base-again")         the base's, bit for bit

Nothing here knows modules, and memory grows neither with the model nor with its largest tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.lazy import fetched

_WHERE = {
    "Delta": "luthier.weights.delta",
    "Selection": "luthier.weights.selection",
    "Weights": "luthier.weights.reader",
    "content_hash": "luthier.weights.hashing",
    "diff": "luthier.weights.compare",
    "diff_tensors": "luthier.weights.compare",
    "from_adapter": "luthier.weights.adapter",
    "write_weights": "luthier.weights.writer",
}
__all__ = ["Delta", "Selection", "Weights", "content_hash", "diff", "diff_tensors", "from_adapter", "write_weights"]

if TYPE_CHECKING:
    from luthier.weights.adapter import from_adapter
    from luthier.weights.compare import diff, diff_tensors
    from luthier.weights.delta import Delta
    from luthier.weights.hashing import content_hash
    from luthier.weights.reader import Weights
    from luthier.weights.selection import Selection
    from luthier.weights.writer import write_weights

__getattr__ = fetched(__name__, _WHERE)
