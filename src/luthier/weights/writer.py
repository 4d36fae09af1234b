"""Weights written while they come: safetensors files whose tensors need not exist all at once, nor any of them whole.

The header of a safetensors file stands in front and tells every tensor's place, which follows from types and shapes;
so `write_weights` writes it first and then asks for one tensor after the other, whole or in pieces. Where sizes are
only known at the end (compressed parts), `PartsFile` leaves room for the header and fills it in last; the format
allows blanks behind a header.

Both flush their files to the disk. They write into a folder that `models.files.write_aside` renames when all is done.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from luthier.errors import InputError
from luthier.models.checkpoint import INDEX, SINGLE
from luthier.weights.info import Info, kind_of, raw

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 5 * 10**9
Piece: TypeAlias = "Tensor | NDArray[Any]"  # an array has the elements as `Info.array` says
Read: TypeAlias = "Callable[[str], Piece | Iterable[Piece]]"
_OTHER_WEIGHTS = (".safetensors", ".bin", ".gguf", ".index.json")


def write_weights(folder: Path, infos: Mapping[str, Info], read: Read, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors into `folder` as transformers does: `model.safetensors`, or shards and an index.

    Args:
        infos: type and shape of each tensor, in the order of writing.
        read: gives a tensor by name, or its elements in C order in pieces; type and size must be those of `infos`.
        shard_bytes: largest size of a shard; a single larger tensor has a shard of its own.
    """
    shards: list[dict[str, Info]] = [{}]
    filled = 0
    for name, info in infos.items():
        if shards[-1] and filled + info.bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += info.bytes
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], read)
        return
    places: dict[str, str] = {}
    for number, members in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, members, read)
        places |= dict.fromkeys(members, file)
    index = {"metadata": {"total_size": sum(info.bytes for info in infos.values())}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, infos: Mapping[str, Info], read: Read) -> None:
    """One safetensors file; arguments as those of `write_weights`."""
    header = _header(infos)
    with path.open("wb") as file:
        file.write(_framed(header, _room(len(header))))
        for name, info in infos.items():
            given = read(name)
            written = 0
            pieces: Any = [given] if hasattr(given, "dtype") else given
            for piece in pieces:
                written += file.write(_bytes(name, info, piece))
            if written != info.bytes:
                raise ValueError(f"{name}: announced as {info}, got {written} bytes")
        file.flush()
        os.fsync(file.fileno())


class PartsFile:
    """A safetensors file of byte strings whose lengths are not known before; a context.

    Args:
        names: all that may be added; those that are not are left out.
    """

    def __init__(self, path: Path, names: Iterable[str]):
        self._infos: dict[str, Info] = {}
        self._room = _room(len(_header({name: Info("U8", (10**15,)) for name in names})))
        self._file = path.open("wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, pieces: Iterable[bytes]) -> int:
        """Append a part, (bytes,) uint8; returns its length."""
        size = sum(self._file.write(piece) for piece in pieces)
        self._infos[name] = Info("U8", (size,))
        return size

    def __enter__(self) -> PartsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with self._file as file:
            if error is None:
                file.truncate()
                file.seek(0)
                file.write(_framed(_header(self._infos), self._room))
                file.flush()
                os.fsync(file.fileno())


def _bytes(name: str, info: Info, piece: Any) -> memoryview:
    """The bytes of a tensor or an array, whose type must be that of `info`."""
    array = isinstance(piece, np.ndarray)
    if (piece.dtype != info.array) if array else (kind_of(piece.dtype) != info.kind):
        raise ValueError(f"{name}: announced as {info}, got {piece.dtype}")
    return piece.data if array else raw(piece).numpy().data


def _header(infos: Mapping[str, Info]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, info in infos.items():
        span = [place, place + info.bytes]
        header[name] = {"dtype": info.kind, "shape": list(info.shape), "data_offsets": span}
        place += info.bytes
    return json.dumps(header, separators=(",", ":")).encode()


def _room(length: int) -> int:
    """Bytes that a header of this length gets: a multiple of 8, and not one whose first two bytes, at the very start
    of the file, look like those of a pickle (80 02 to 80 05) to readers that go by them."""
    room = length + -length % 8
    while room % 256 == 0x80 and room // 256 % 256 in (2, 3, 4, 5):
        room += 8
    return room


def _framed(header: bytes, room: int) -> bytes:
    return room.to_bytes(8, "little") + header.ljust(room)


def refuse_filled(out: Path) -> None:
    """`InputError` unless `out` is free or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("this place is taken", where=str(out), fix="name a new folder")


def copy_others(source: Path, out: Path) -> None:
    """Config, tokenizer and the like: every file of the folder that holds no weights."""
    if not source.is_dir():
        return
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_OTHER_WEIGHTS) and path.name != "SHA256SUMS":
            shutil.copy2(path, out / path.name)
