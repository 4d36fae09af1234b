"""The first pass over a data set: every row goes to a scratch file, a few numbers of it stay in memory.

For each row about 60 bytes are held (who it is, what it says as a 64-bit key, group, class, source, place in the
scratch file), never its text; the sketches for near duplicates, 512 bytes a row, are on disk too. So the memory that
preparing needs grows with the number of rows, slowly, and not at all with their size.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from luthier.data.clean import content_key, empty_parts, key_of, private_data, row_text, word_hashes
from luthier.data.forms import Row
from luthier.data.near_duplicates import FUNCTIONS, sketch
from luthier.data.roles import is_judged
from luthier.errors import InputError

MAX_CLASSES = 10_000
EMPTY, EMPTY_JUDGED = 1, 2  # an empty answer to be imitated, and one to be compared
_TOLD_BY = ("messages", "chosen", "desirable", "completion", "text", "image")  # the first column says the form
SHOWN = 5  # places named in a finding


class Ledger:
    """The rows of a data set on disk and their numbers in memory; `add` all rows, then `close`, then ask.

    Attributes (arrays over rows, after `close`):
        ids: uint64, from the content exactly.        keys: uint64, from the text, or the image.
        groups: uint64, equal within a group.         classes: int32, index into `labels`; -1 without a label.
        sources: int16, as given to `add`.            characters: int64, length of the text.
        empty: int8, 1 where an answer is empty, 2 where it is that of a pair or a judged answer; else 0.
    And over all rows: `labels`, `forms`, `private` (rows with each kind of private data).
    """

    def __init__(self, folder: Path, *, sketches: bool):
        self._rows_path, self._sketch_path = folder / "rows.jsonl", folder / "sketches"
        self._rows = self._rows_path.open("w+b")
        self._sketches = self._sketch_path.open("wb") if sketches else None
        self._columns = {name: array(code) for name, code in _COLUMNS.items()}
        self._codes: dict[str, int] = {}
        self._offset = 0
        self.labels: list[str] = []
        self.forms: Counter[str] = Counter()
        self.private: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._columns["ids"])

    def add(self, rows: Iterable[Row], source: int) -> int:
        """Write `rows` down as those of `source`; how many there were."""
        before = len(self)
        for row in rows:
            self._add(row, source)
        return len(self) - before

    def _add(self, row: Row, source: int) -> None:
        try:
            line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
        except UnicodeEncodeError:
            raise InputError("the text holds half of a surrogate pair", where=row["where"]) from None
        text = row_text(row)
        numbers = {
            "ids": int(row["id"], 16),
            "keys": key_of(row["image"]) if "image" in row else content_key(text),
            "groups": key_of(row["group"]) if "group" in row else 0,
            "classes": self._class(row) if "label" in row else -1,
            "sources": source,
            "characters": len(text),
            "empty": (EMPTY_JUDGED if is_judged(row) else EMPTY) if empty_parts(row) else 0,
            "offsets": self._offset,
        }
        for name, number in numbers.items():
            self._columns[name].append(number)
        self._rows.write(line)
        self._offset += len(line)
        if self._sketches is not None:
            self._sketches.write(sketch(word_hashes(row_text(row, system=False))).tobytes())
        self.forms[next(form for form in _TOLD_BY if form in row)] += 1
        self.private.update(private_data(text).keys())

    def _class(self, row: Row) -> int:
        name = str(row["label"])
        if name not in self._codes:
            if len(self._codes) == MAX_CLASSES:
                what = f"the column for data.label_key has more than {MAX_CLASSES} different values"
                raise InputError(what, where=row["where"], fix="name a column that holds classes")
            self._codes[name] = len(self._codes)
            self.labels.append(name)
        return self._codes[name]

    def close(self) -> None:
        """No more rows: the columns become arrays."""
        self._rows.flush()
        if self._sketches is not None:
            self._sketches.close()
        columns = {name: np.frombuffer(column, dtype=column.typecode) for name, column in self._columns.items()}
        self.ids: NDArray[np.uint64] = columns["ids"]
        self.keys: NDArray[np.uint64] = columns["keys"]
        self.groups: NDArray[np.uint64] = columns["groups"]
        self.classes: NDArray[np.int32] = columns["classes"]
        self.sources: NDArray[np.int16] = columns["sources"]
        self.characters: NDArray[np.int64] = columns["characters"]
        self.empty: NDArray[np.int8] = columns["empty"]

    def release(self) -> None:
        """Let go of the scratch files."""
        self._rows.close()
        if self._sketches is not None:
            self._sketches.close()

    def sketches(self) -> NDArray[np.uint32]:
        """(rows, 128) memory-mapped; see `near_duplicates`."""
        return np.memmap(self._sketch_path, dtype=np.uint32, mode="r").reshape(len(self), FUNCTIONS)

    def lines(self) -> Iterator[bytes]:
        """Every row as the line that was written, in order."""
        with self._rows_path.open("rb") as handle:
            yield from handle

    def row(self, index: int) -> dict[str, Any]:
        """One row, from disk."""
        self._rows.seek(self._columns["offsets"][index])
        return json.loads(self._rows.readline())

    def rows(self, chosen: NDArray[np.bool_]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Index and row of each row that is `chosen` (a mask over all rows), in order."""
        for index, line in enumerate(self.lines()):
            if chosen[index]:
                yield index, json.loads(line)

    def places(self, indices: Iterable[int]) -> str:
        """Where the first few of some rows are, for a sentence."""
        return ", ".join(str(self.row(int(index))["where"]) for _, index in zip(range(SHOWN), indices, strict=False))


_COLUMNS = {"ids": "Q", "keys": "Q", "groups": "Q", "classes": "i", "sources": "h", "characters": "q", "empty": "b"}
_COLUMNS |= {"offsets": "q"}


class LedgerRows(Sequence[dict[str, Any]]):
    """Some of a ledger's rows, read from disk when they are asked for: by place, or all in order."""

    def __init__(self, ledger: Ledger, chosen: NDArray[np.bool_]):
        self._ledger, self._chosen, self.indices = ledger, chosen, np.flatnonzero(chosen)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for _, row in self._ledger.rows(self._chosen))

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self._ledger.row(int(i)) for i in self.indices[index]]
        return self._ledger.row(int(self.indices[index]))
