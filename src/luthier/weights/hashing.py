"""Hashes of content: the same for one shard or fifty, in any order, and another when a single bit is.

    tensor    xxh3 (128 bits) of type, shape and bytes
    weights   sha256 over the sorted pairs (name, hash of the tensor)

Tied weights count as often as the files hold them. xxh3 runs at memory speed and finds any mistake; it does not stop
somebody who forges a collision on purpose. For that, compare the SHA-256 of the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from luthier.weights.info import Info, raw

if TYPE_CHECKING:
    from torch import Tensor


class TensorHash:
    """The hash of a tensor that comes in pieces: `update` with each, in C order, then `hex`."""

    def __init__(self, info: Info):
        self._hash = xxhash.xxh3_128(f"{info.kind}{list(info.shape)}".encode())

    def update(self, piece: Tensor | NDArray[Any]) -> None:
        """A tensor, or an array with its bytes."""
        self._hash.update(piece.data if isinstance(piece, np.ndarray) else raw(piece).numpy().data)

    def hex(self) -> str:
        return self._hash.hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """Hash of a tensor's type, shape and bytes, hex."""
    found = TensorHash(Info.of(tensor))
    found.update(tensor)
    return found.hex()


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash of a set of weights, hex; tensors are looked at one at a time."""
    return combined({name: tensor_hash(tensors[name]) for name in tensors})


def combined(hashes: Mapping[str, str]) -> str:
    """The hash of a set of weights from those of its tensors."""
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()
