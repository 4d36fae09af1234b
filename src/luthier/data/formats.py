"""Files of any common shape as a stream of raw rows, each with its line: nothing here knows what a row means.

    .jsonl .ndjson   one JSON object on each line
    .json            one JSON array of objects, read element by element; or lines, as above
    .csv .tsv        the first line names the columns; `;` between columns is seen where there is no `,`
    .parquet .arrow  in batches
    a folder         one data set, or one part of several, saved by `datasets.save_to_disk`

No reader holds more than one row, or one batch of columns, in memory. Text is UTF-8, with or without a byte order
mark, with either kind of line end. Whatever cannot be read is an `InputError` with file, line and, inside a row, key.
A row of more than `MAX_ROW_BYTES` is taken for a file of another kind, or a quotation mark left open.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from luthier.data.json_rows import RawRows, json_lines, json_rows
from luthier.data.text_lines import text_lines
from luthier.errors import InputError, did_you_mean

MAX_ROW_BYTES = 64 * 2**20
BATCH_ROWS = 1024


def read_file(path: Path, *, max_row_bytes: int = MAX_ROW_BYTES) -> RawRows:
    """The rows of one file or saved data set, with the line each begins on (row number where there are no lines).

    Raises `InputError` where the path is not there, is of an unknown kind, or cannot be read.
    """
    if not path.exists():
        raise _missing(path)
    if path.is_dir():
        return _saved_data_set(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        kind = f"files that end in {path.suffix!r}" if path.suffix else "files without an ending"
        raise InputError(f"{kind} cannot be read", where=str(path), fix=f"known are {', '.join(READERS)}, and folders")
    if not path.is_file():
        raise InputError("this is not a regular file", where=str(path))
    return _guarded(path, reader(path, max_row_bytes))


def _guarded(path: Path, rows: RawRows) -> RawRows:
    try:
        yield from rows
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from None


def _missing(path: Path) -> InputError:
    parent = path.parent
    if not parent.is_dir():
        return InputError(f"there is no folder {str(parent)!r}", where=str(path))
    near = [entry.name for entry in parent.iterdir() if entry.suffix.lower() in READERS or entry.is_dir()]
    return InputError("there is no such file", where=str(path), fix=did_you_mean(path.name, near) if near else None)


# -- tables of text


def _table(path: Path, limit: int) -> RawRows:
    with path.open("rb") as handle:
        lines = _TableLines(path, handle, limit)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ";" if lines.semicolons() else ","
        # The reader's own limit is one figure for the whole process; ours is checked above, so it is only ever raised.
        csv.field_size_limit(max(csv.field_size_limit(), limit))
        records = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(records, [])
            _check_header(header, f"{path}:{lines.begin()}")
            while (record := next(records, None)) is not None:
                line = lines.begin()
                if len(record) != len(header) and record:
                    what = f"the row has {len(record)} columns, the header has {len(header)}"
                    raise InputError(what, where=f"{path}:{line}", fix="quote texts that hold a separator")
                if record:
                    yield line, dict(zip(header, record, strict=True))
        except csv.Error as error:
            what = "a quotation mark is left open" if "unexpected end" in str(error) else f"not a table: {error}"
            raise InputError(what, where=f"{path}:{lines.begin()}") from None


class _TableLines:
    """The lines that the records of a table are made of; knows where the present record began and how long it is."""

    def __init__(self, path: Path, handle: BinaryIO, limit: int):
        self.path, self.limit = path, limit
        self.source = ((number, text) for number, text in text_lines(path, handle, limit))
        self.ahead = next(((number, text) for number, text in self.source if text.strip()), None)
        self.first, self.size = 0, 0

    def semicolons(self) -> bool:
        """Whether the header is separated by semicolons, as spreadsheets do where the comma is the decimal point."""
        return self.ahead is not None and ";" in self.ahead[1] and "," not in self.ahead[1]

    def begin(self) -> int:
        """The line on which the record just read began; the next line begins a new record."""
        begin, self.first, self.size = self.first, 0, 0
        return begin

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, text = self.ahead or next(self.source)
        self.ahead = None
        self.first, self.size = self.first or number, self.size + len(text)
        if self.size > self.limit:
            what = f"the row that begins here is longer than {self.limit} bytes"
            raise InputError(what, where=f"{self.path}:{self.first}", fix="is a quotation mark left open?")
        return text


def _check_header(header: list[str], where: str) -> None:
    double = [name for name in header if header.count(name) > 1]
    if double:
        raise InputError(f"the header names the column {double[0]!r} twice", where=where)
    if header and not all(name.strip() for name in header):
        raise InputError(f"column {[not name.strip() for name in header].index(True) + 1} has no name", where=where)


# -- columns in batches


def _parquet(path: Path, limit: int) -> RawRows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _batches(file.iter_batches(batch_size=BATCH_ROWS))
    except (pa.ArrowException, OSError, EOFError) as error:
        raise _unreadable("Parquet file", error, path) from None


def _arrow(path: Path, limit: int) -> RawRows:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as memory:
            try:
                file = pa.ipc.open_file(memory)
                yield from _batches(file.get_batch(index) for index in range(file.num_record_batches))
            except pa.ArrowInvalid:
                memory.seek(0)
                yield from _batches(iter(pa.ipc.open_stream(memory)))
    except (pa.ArrowException, OSError, EOFError) as error:
        raise _unreadable("Arrow file", error, path) from None


def _batches(batches: Iterator[Any]) -> RawRows:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for row in batch.slice(start, BATCH_ROWS).to_pylist():
                number += 1
                yield number, row


def _unreadable(kind: str, error: Exception, path: Path) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"not a whole {kind}: {reason}", where=str(path), fix="is it cut short?")


def saved_parts(path: Path) -> dict[str, Path]:
    """The parts of a folder that `DatasetDict.save_to_disk` wrote, by name; empty for any other path."""
    index = path / "dataset_dict.json"
    if not index.is_file():
        return {}
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["splits"]
        return {str(name): path / str(name) for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError("does not list the parts of a saved data set", where=str(index)) from None


def _saved_data_set(path: Path) -> RawRows:
    if parts := saved_parts(path):
        if len(parts) > 1 and "train" not in parts:
            fix = f"name one of them, such as {path}/{min(parts)}"
            raise InputError(f"the data set has the parts {', '.join(sorted(parts))}", where=str(path), fix=fix)
        path = parts.get("train", next(iter(parts.values())))
    if not (path / "state.json").is_file():
        inside = sorted(e.name for e in path.iterdir() if e.suffix.lower() in READERS) if path.is_dir() else []
        fix = f"name a file in it: {', '.join(inside[:8])}" if inside else "name a file"
        raise InputError("the folder holds no saved data set (no state.json)", where=str(path), fix=fix)
    from datasets import Dataset, load_from_disk

    try:
        data_set = load_from_disk(str(path))
    except Exception as error:  # whatever the library raises for a broken folder
        raise _unreadable("saved data set", error, path) from None
    if not isinstance(data_set, Dataset):
        raise InputError("the folder holds several data sets, not one", where=str(path))
    return _data_set_rows(data_set.with_format(None))


def _data_set_rows(data_set: Any) -> RawRows:
    number = 0
    for batch in data_set.iter(batch_size=BATCH_ROWS):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield number, dict(zip(names, values, strict=True))


READERS: dict[str, Callable[[Path, int], RawRows]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_rows,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
