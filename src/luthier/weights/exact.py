"""The exact difference of two tensors, compressed: what leads from one to the other and back, bit for bit.

Floating-point differences do neither: a + (b - a) need not be b. But the bits of a number are an integer, and integers
subtract without loss:

    d = bits(tuned) - bits(base)  mod 2^k          tuned = base + d,  base = tuned - d,  for any bits: nan, -0.0, ...

A small change of a number is a small d, since neighbouring floats have neighbouring bits. So d is stored without its
sign in front (zigzag: 0, -1, 1, -2 become 0, 1, 2, 3), byte plane by byte plane, and compressed: the high planes are
nearly all zero. Where few elements differ, only those are stored, with their places.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.errors import InputError
from luthier.weights.stream import raw

SPARSE_BELOW = 0.1  # share of changed elements below which places are stored
_PIECE = 2**24  # elements compressed in one go


def difference(base: Tensor, tuned: Tensor) -> NDArray[np.unsignedinteger]:
    """bits(tuned) - bits(base), zigzag, (elements,) unsigned; both tensors of one dtype and shape."""
    a, b = _bits(base), _bits(tuned)
    with np.errstate(over="ignore"):
        return _zigzag(b - a)


def add(tensor: Tensor, stored: NDArray[np.unsignedinteger], *, sign: int = 1) -> Tensor:
    """The tensor whose bits are those of `tensor` plus (or, `sign=-1`, minus) a `difference`; a new one."""
    bits = _bits(tensor)
    with np.errstate(over="ignore"):
        moved = bits + _unzigzag(stored) if sign > 0 else bits - _unzigzag(stored)
    flat = torch.from_numpy(moved.view(np.uint8)).view(tensor.dtype)
    return flat.reshape(tensor.shape)


def pack(values: NDArray[np.unsignedinteger]) -> bytes:
    """Byte planes, compressed piece by piece; see `unpack`."""
    pieces = []
    for start in range(0, len(values), _PIECE):
        piece = values[start : start + _PIECE]
        planes = np.ascontiguousarray(piece.view(np.uint8).reshape(len(piece), -1).T)
        data = zlib.compress(planes.tobytes(), 1)
        pieces.append(len(data).to_bytes(8, "little") + data)
    return b"".join(pieces)


def unpack(data: bytes, count: int, width: int) -> NDArray[np.unsignedinteger]:
    """`count` unsigned integers of `width` bytes from what `pack` gave; `InputError` if it is damaged."""
    found = np.empty(count, dtype=f"u{width}")
    place = 0
    try:
        for start in range(0, count, _PIECE):
            size = min(_PIECE, count - start)
            length = int.from_bytes(data[place : place + 8], "little")
            planes = np.frombuffer(zlib.decompress(data[place + 8 : place + 8 + length]), np.uint8)
            found[start : start + size] = np.ascontiguousarray(planes.reshape(width, size).T).view(f"u{width}")[:, 0]
            place += 8 + length
    except (zlib.error, ValueError) as error:
        raise InputError(f"a tensor of the delta is damaged ({error})", fix="make or copy the delta again") from None
    return found


def _bits(tensor: Tensor) -> NDArray[np.unsignedinteger]:
    width = tensor.element_size()
    return raw(tensor).numpy().view(f"u{width}")


def _zigzag(d: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    signed = d.view(f"i{d.itemsize}")
    return ((signed << 1) ^ (signed >> (8 * d.itemsize - 1))).view(d.dtype)


def _unzigzag(z: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    one = z.dtype.type(1)
    return (z >> one) ^ (~(z & one) + one)
