"""Rows of a JSON Lines file at random: only where each line begins is held in memory (8 bytes a row)."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from luthier.errors import InputError

_CHUNK = 2**24


class Rows(Sequence[dict[str, Any]]):
    """The rows of `path`, a file with one JSON object on each line: `len`, `[index]`, slices (lists), iteration.

    The file is memory-mapped and must not change while it is open. An object can be sent to other processes, which
    open the file anew. Raises `InputError` if the file is not there or a line is not a JSON object.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as handle:
                empty = not handle.read(1)
                # An empty file cannot be mapped; the map outlives the handle.
                self._bytes = b"" if empty else mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
        self._begins, self._ends = _lines(self._bytes)

    def __len__(self) -> int:
        return len(self._begins)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[single] for single in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index = int(index) % len(self)
        try:
            row = json.loads(self._bytes[self._begins[index] : self._ends[index]])
        except ValueError:
            raise InputError("the line is not JSON", where=f"{self.path}:{index + 1}") from None
        if not isinstance(row, dict):
            raise InputError(
                f"the row is of type {type(row).__name__}, not an object", where=f"{self.path}:{index + 1}"
            )
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> str:
        return str(self.path)

    def __setstate__(self, path: str) -> None:
        Rows.__init__(self, path)


def _lines(content: bytes | mmap.mmap) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each line that is not empty begins and ends, in bytes."""
    found = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(content), _CHUNK):
        block = np.frombuffer(content[start : start + _CHUNK], dtype=np.uint8)
        found.append(np.flatnonzero(block == ord("\n")) + start)
    ends = np.concatenate(found)
    if len(content) and (not len(ends) or ends[-1] != len(content) - 1):
        ends = np.append(ends, len(content))
    begins = np.concatenate([np.zeros(min(1, len(ends)), dtype=np.int64), ends[:-1] + 1])
    keep = ends > begins
    return begins[keep], ends[keep]
