"""The exact difference of two tensors, compressed: what leads from one to the other and back, bit for bit.

Floating-point differences do neither: a + (b - a) need not be b. But the bits of a number are an integer, and integers
subtract without loss:

    d = bits(tuned) - bits(base)  mod 2^k          tuned = base + d,  base = tuned - d,  for any bits: nan, -0.0, ...

A small change of a number is a small d, since neighbouring floats have neighbouring bits. So d is stored without its
sign in front (zigzag: 0, -1, 1, -2 become 0, 1, 2, 3), byte plane by byte plane: the high planes are nearly all zero.

A tensor is cut into pieces of a million elements, so that memory does not grow with it. Each piece is

    0                            nothing changed
    1, count, gaps, values       few elements changed: how far each lies from the one before, and its d
    2, values                    the d of all elements

and each plane of gaps or values is a zlib stream with its length in front. The planes hold runs and noise but no
phrases, so zlib is told to look for runs only. On differences of a 135M model, tuned in bfloat16 and in float32, that
was smaller than zlib's levels 1 and 6 and lzma's 0, and faster than each. Packing on two threads gained a tenth at
most, so there are none.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.errors import InputError
from luthier.weights.info import cut, raw

PIECE = 2**20  # elements
SPARSE_BELOW = 0.25  # share of changed elements below which their places are stored: smaller and faster up to there
Bits = NDArray[np.unsignedinteger]


class Packed(NamedTuple):
    """A piece: its bytes, and how many of its elements changed."""

    data: bytes
    changed: int


def encode(base: Tensor, tuned: Tensor) -> Iterator[Packed]:
    """The difference of two tensors of one shape, piece by piece; `base` in the dtype of `tuned`, or a narrower one."""
    for old, new in zip(cut(base, PIECE), cut(tuned, PIECE), strict=True):
        yield pack(difference(old.to(new.dtype), new))


def decode(data: memoryview, count: int, width: int, piece: int) -> Iterator[Bits]:
    """Back from `encode`: `count` integers of `width` bytes, in pieces of `piece`; `InputError` if it is damaged."""
    place = 0
    for start in range(0, count, piece):
        try:
            values, place = unpack(data, place, min(piece, count - start), width)
        except (zlib.error, struct.error, ValueError, IndexError) as error:
            fix = "make or copy the delta again"
            raise InputError(f"a tensor of the delta is damaged ({error})", fix=fix) from None
        yield values
    if place != len(data):
        raise InputError("a tensor of the delta is longer than its shape says", fix="make or copy the delta again")


def difference(base: Tensor, tuned: Tensor) -> Bits:
    """bits(tuned) - bits(base), zigzag, (elements,) unsigned; both tensors of one dtype and shape."""
    with np.errstate(over="ignore"):
        return _zigzag(_bits(tuned) - _bits(base))


def add(tensor: Tensor, stored: Bits, *, sign: int = 1) -> Tensor:
    """The tensor whose bits are those of `tensor` plus (or, `sign=-1`, minus) a `difference`; a new one."""
    bits = _bits(tensor)
    with np.errstate(over="ignore"):
        moved = bits + _unzigzag(stored) if sign > 0 else bits - _unzigzag(stored)
    return torch.from_numpy(moved.view(np.uint8)).view(tensor.dtype).reshape(tensor.shape)


def pack(values: Bits) -> Packed:
    """One piece, (elements,) unsigned."""
    places = np.flatnonzero(values)
    changed = len(places)
    if not changed:
        return Packed(b"\0", 0)
    if changed >= SPARSE_BELOW * len(values):
        return Packed(b"\2" + _planes(values), changed)
    gaps = np.diff(places, prepend=0).astype("<u4")
    return Packed(b"\1" + struct.pack("<I", changed) + _planes(gaps) + _planes(values[places]), changed)


def unpack(data: memoryview, place: int, count: int, width: int) -> tuple[Bits, int]:
    """The piece of `count` elements that begins at `place`, and where the next begins."""
    kind, place = data[place], place + 1
    if kind == 2:
        return _from_planes(data, place, count, width)
    values = np.zeros(count, dtype=f"<u{width}")
    if kind == 0:
        return values, place
    if kind != 1:
        raise ValueError(f"a piece of kind {kind}")
    (changed,) = struct.unpack_from("<I", data, place)
    if changed > count:
        raise ValueError(f"{changed} changes in {count} elements")
    gaps, place = _from_planes(data, place + 4, changed, 4)
    found, place = _from_planes(data, place, changed, width)
    values[np.cumsum(gaps, dtype=np.int64)] = found
    return values, place


def _planes(values: Bits) -> bytes:
    parts = []
    for plane in np.ascontiguousarray(values.view(np.uint8).reshape(len(values), -1).T):
        packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
        data = packer.compress(plane.data) + packer.flush()
        parts += [struct.pack("<I", len(data)), data]
    return b"".join(parts)


def _from_planes(data: memoryview, place: int, count: int, width: int) -> tuple[Bits, int]:
    planes = np.empty((count, width), dtype=np.uint8)
    for plane in range(width):
        (length,) = struct.unpack_from("<I", data, place)
        unpacker = zlib.decompressobj()
        found = unpacker.decompress(data[place + 4 : place + 4 + length], count + 1)  # no more, whatever it claims
        if len(found) != count or not unpacker.eof:
            raise ValueError(f"a plane of {len(found)} bytes, expected {count}")
        planes[:, plane] = np.frombuffer(found, np.uint8)
        place += 4 + length
    return planes.view(f"<u{width}")[:, 0], place


def _bits(tensor: Tensor) -> Bits:
    return raw(tensor).numpy().view(f"<u{tensor.element_size()}")


def _zigzag(d: Bits) -> Bits:
    signed = d.view(f"i{d.itemsize}")
    return ((signed << 1) ^ (signed >> (8 * d.itemsize - 1))).view(d.dtype)


def _unzigzag(z: Bits) -> Bits:
    one = z.dtype.type(1)
    return (z >> one) ^ (~(z & one) + one)
