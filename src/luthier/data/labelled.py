"""Rows with a class into what a classifier reads: tokens or pixels, and the number of the class.

    row                         example
    {"text": ..., "label": c}   {"input_ids": [...], "label": number of c}       as the tokenizer encodes a text
    {"image": ..., "label": c}  {"pixel_values": (channels, height, width), "label": number of c}

`label` is the column that `data.label_key` names: the class, a word or a whole number (3 and "3" are one class). Which
number it has is the model's (`luthier.models.labels`); `classes_of` has the order in which a new head counts them.

A text keeps the special tokens that the tokenizer puts around it, also when it is cut. Pixels come from the model's
own image processor (size, scale, mean). Without one they are divided by 255, and every picture must have the model's
size. Examples of pictures are kept as float32, 4 bytes for each number the model sees, so that no step waits for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from luthier.data.encode import Row
from luthier.data.pictures import pixels
from luthier.data.roles import LABELLED
from luthier.data.settings import DataSettings
from luthier.data.store import automatic_max_length, written_aside
from luthier.errors import InputError, did_you_mean
from luthier.findings import Finding

_WHOLE = re.compile(r"-?\d{1,18}", re.ASCII)

CHUNK_ROWS = 256  # rows read in one call
PATCH = 16  # side, in pixels, of what counts as one token where the model does not cut pictures into patches
_FILES = ("examples.arrow", "encoding.json")


class Labelled(TypedDict, total=False):
    """One example: `label`, and either `input_ids` or `pixel_values` (channels, height, width) float32."""

    input_ids: list[int]
    pixel_values: NDArray[np.float32]
    label: int


def classes_of(rows: Iterable[Row]) -> list[str]:
    """The classes of `rows`, each once, in the order of `in_order`.

    Raises `InputError` for a row without a class, or if there are fewer than two.
    """
    return in_order({label_of(row) for row in rows})


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order in which a new head counts them: whole numbers by size, then words by the alphabet.

    Raises `InputError` for fewer than two.
    """
    found = set(names)
    if len(found) < 2:
        what = f"the training rows have {len(found)} class{'' if len(found) == 1 else 'es'}, and a classifier needs two"
        raise InputError(what, where="data.label_key", fix="check which column it names")
    whole = {name: int(name) for name in found if _WHOLE.fullmatch(name)}
    return sorted(found, key=lambda name: (name not in whole, whole.get(name, 0), name))


def label_of(row: Row) -> str:
    """The class of a row, as text; `InputError` where it has none."""
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        got = "no label" if label is None else f"a label of type {type(label).__name__}"
        fix = "name the column with its class in data.label_key" if label is None else "write words or whole numbers"
        raise InputError(f"the row has {got}, and a classifier learns from classes", where=row.get("where"), fix=fix)
    return str(label)


class Reader:
    """What a model is fed of a row.

    Args:
        processor: a tokenizer or an image processor of transformers; None for pictures that need no more than scaling.
        config: the model's; says how many channels, how large and in which patches it takes pictures.
        pictures: whether rows hold pictures.
    """

    def __init__(self, processor: Any, config: Any, *, pictures: bool):
        self.processor, self.config, self.pictures = processor, config, pictures
        reads_text = hasattr(processor, "convert_ids_to_tokens")
        if reads_text == pictures or (not pictures and processor is None):
            other = "texts" if reads_text else "pictures"
            raise InputError(
                f"the rows hold {'pictures' if pictures else 'texts'}, and the model reads {other}",
                where="data",
                fix="take a model of the other kind, or other rows",
            )
        longest = getattr(processor, "model_max_length", None)
        self.longest = longest if reads_text and longest and longest < 10**9 else None  # the rest stands for no limit
        self.channels = int(getattr(config, "num_channels", 3) or 3)

    @classmethod
    def of(cls, rows: Iterable[Row], processor: Any, config: Any) -> Reader:
        """The reader for rows like the first of `rows`."""
        first = next(iter(rows), None)
        if first is None:
            raise InputError("there are no rows", where="data")
        if "image" not in first and "text" not in first:
            keys = ", ".join(key for key in first if key not in ("where", "id"))
            fix = "a classifier reads rows with `text` or `image`; data.columns names your own columns"
            raise InputError(f"the row has {keys}, and no text or image", where=first.get("where"), fix=fix)
        return cls(processor, config, pictures="image" in first)

    def inputs(self, rows: Sequence[Row], limit: int | None = None) -> list[Any]:
        """Token ids, cut to `limit`, or pixels (channels, height, width) float32, of each row."""
        name = "image" if self.pictures else "text"
        for row in rows:
            if not isinstance(row.get(name), str):
                raise InputError(f"the row has no {name}, which the rows before it have", where=row.get("where"))
        if not self.pictures:
            cut: dict[str, Any] = {"truncation": True, "max_length": limit} if limit is not None else {}
            return list(self.processor([row["text"] for row in rows], verbose=False, **cut)["input_ids"])
        return [self._seen(row) for row in rows]

    def _seen(self, row: Row) -> NDArray[np.float32]:
        seen = pixels(row["image"], self.channels, row.get("where"))
        if self.processor is not None:
            made = self.processor(images=[seen], input_data_format="channels_last", return_tensors="np")
            return np.asarray(made["pixel_values"][0], dtype=np.float32)
        size = getattr(self.config, "image_size", None)
        wanted = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if size is not None and seen.shape[:2] != wanted:
            raise InputError(
                f"the picture is {seen.shape[1]} by {seen.shape[0]} pixels, and the model takes {wanted[1]} by "
                f"{wanted[0]}",
                where=row.get("where"),
                fix="give the model an image processor (preprocessor_config.json), which scales pictures",
            )
        return np.ascontiguousarray(seen.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)

    def size(self, fed: Any) -> int:
        """How many tokens an input counts as; of a picture its patches, and one for the class token."""
        if not self.pictures:
            return len(fed)
        shape = fed.shape
        patch = getattr(self.config, "patch_size", None)
        side = patch if isinstance(patch, int) and patch > 0 else PATCH
        return -(-shape[1] // side) * -(-shape[2] // side) + 1


class LabelledEncodings:
    """The encoded examples of one split: `len`, `[index]` and iteration, from a memory-mapped file.

    Attributes:
        lengths: (examples,) int64, tokens of each; of a picture, patches.
        row: (examples,) int64, index of the row each came from.
        role: (examples,) int64, all `LABELLED`.
        facts, findings: as of `luthier.data.store.Encodings`.
    """

    def __init__(self, directory: Path):
        directory = Path(directory)
        try:
            stored = json.loads((directory / _FILES[1]).read_text(encoding="utf-8"))
            table = pa.ipc.open_file(pa.memory_map(str(directory / _FILES[0]))).read_all()
        except (OSError, ValueError, pa.ArrowInvalid) as error:
            raise InputError(f"no whole encoded split here: {error}", where=str(directory)) from None
        self.facts: dict[str, Any] = stored["facts"]
        self.findings = [Finding.model_validate(finding) for finding in stored["findings"]]
        self._inputs, self._labels = table.column("inputs"), table.column("label")
        self._shape: list[int] | None = self.facts["shape"]
        self.lengths = table.column("length").to_numpy().astype(np.int64)
        self.row = table.column("row").to_numpy().astype(np.int64)
        self.role = np.full(len(self.lengths), LABELLED, dtype=np.int64)
        self.loss_tokens = np.ones(len(self.lengths), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Labelled:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        found = self._inputs[index].values.to_numpy()
        label = int(self._labels[index].as_py())
        if self._shape is None:
            return {"input_ids": found.tolist(), "label": label}
        return {"pixel_values": found.reshape(self._shape), "label": label}

    def __iter__(self) -> Iterator[Labelled]:
        return (self[index] for index in range(len(self)))


def encode_labelled(
    rows: Iterable[Row],
    reader: Reader,
    numbers: Mapping[str, int],
    settings: DataSettings,
    directory: Path,
    max_length: int | Literal["auto"] | None = None,
    *,
    context: int | None = None,
) -> LabelledEncodings:
    """Encode `rows` into `directory` (made if missing) and open the result.

    Args:
        rows: canonical rows with `label`; read twice where `max_length` is "auto".
        numbers: of each class, by its name as text.
        settings: `too_long` is used.
        max_length, context: as in `luthier.data.store.encode_split`; of no influence on pictures.

    Raises `InputError`, with the row's place, for a class that has no number, for a row of another kind than the
    others, and for a picture of another size than the first where nothing scales it.
    """
    context = min((n for n in (context, reader.longest) if n is not None), default=None)
    limit = context if max_length is None else max_length
    if limit == "auto":
        lengths = [] if reader.pictures else [len(ids) for chunk in _chunks(rows) for ids in reader.inputs(chunk)]
        found = np.asarray(lengths, dtype=np.int64)
        limit = None if reader.pictures else automatic_max_length(found, context, cut=settings.too_long != "error")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    number = pa.float32() if reader.pictures else pa.int32()
    schema = pa.schema(
        [("inputs", pa.large_list(number)), ("label", pa.int64()), ("length", pa.int64()), ("row", pa.int64())]
    )
    counts = _Counts(limit, settings)
    with written_aside(directory, _FILES) as aside:
        with pa.OSFile(str(aside[0]), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            at = 0
            for chunk in _chunks(rows):
                batch: list[tuple[Any, int, int, int]] = []
                for index, (row, uncut) in enumerate(zip(chunk, reader.inputs(chunk), strict=True), start=at):
                    label = _number(row, numbers)
                    fed = counts.sift(row, uncut, reader)
                    if fed is not None:
                        batch.append((fed.ravel() if reader.pictures else fed, label, reader.size(fed), index))
                columns = zip(*batch, strict=True) if batch else ([], [], [], [])
                arrays = [pa.array(list(c), field.type) for c, field in zip(columns, schema, strict=True)]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
                at += len(chunk)
        stored = {"facts": counts.facts(), "findings": [f.model_dump(mode="json") for f in counts.findings()]}
        aside[1].write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return LabelledEncodings(directory)


class _Counts:
    """What a stream of examples adds up to, and what is done with those that are too long."""

    def __init__(self, limit: int | None, settings: DataSettings):
        self.limit, self.settings = limit, settings
        self.rows = self.examples = self.tokens = self.truncated = self.dropped = 0
        self.shape: list[int] | None = None

    def sift(self, row: Row, uncut: Any, reader: Reader) -> Any:
        """What is kept of one row's input; None if the row is dropped."""
        self.rows += 1
        if reader.pictures:
            shape = list(uncut.shape)
            self.shape = self.shape or shape
            if shape != self.shape:
                what = f"the picture comes to the shape {shape}, those before it to {self.shape}"
                raise InputError(what, where=row.get("where"), fix="scale all pictures to one size")
            self.examples, self.tokens = self.examples + 1, self.tokens + reader.size(uncut)
            return uncut
        if self.limit is not None and len(uncut) > self.limit:
            if self.settings.too_long == "error":
                what = f"the row has {len(uncut)} tokens, more than max_length {self.limit}"
                fix = "raise data.max_length, or set data.too_long to truncate or drop"
                raise InputError(what, where=row.get("where"), fix=fix)
            if self.settings.too_long == "drop":
                self.dropped += 1
                return None
            self.truncated += 1
            uncut = reader.inputs([row], self.limit)[0]  # cut by the tokenizer, so that its end token stays
        self.examples, self.tokens = self.examples + 1, self.tokens + len(uncut)
        return uncut

    def facts(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "examples": self.examples,
            "tokens": self.tokens,
            "max_length": self.limit,
            "shape": self.shape,
            "truncated": self.truncated,
            "dropped_rows": self.dropped,
        }

    def findings(self) -> list[Finding]:
        told = [("truncated", self.truncated, "were cut to"), ("too_long", self.dropped, "were dropped for more than")]
        return [
            Finding(
                level="warn",
                code=f"data.{code}",
                message=f"{count} of {self.rows} rows {what} {self.limit} tokens",
                value=count / self.rows,
                limit=0.01,
            )
            for code, count, what in told
            if count > 0.01 * self.rows
        ]


def _number(row: Row, numbers: Mapping[str, int]) -> int:
    name = label_of(row)
    if name not in numbers:
        fix = did_you_mean(name, list(numbers))
        raise InputError(f"the class {name!r} is not one that the model learns", where=row.get("where"), fix=fix)
    return numbers[name]


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    stream = iter(rows)
    while chunk := list(islice(stream, CHUNK_ROWS)):
        yield chunk
