"""Encoded examples on disk: written as a stream, read at random through a memory map.

One Arrow file holds the examples of a split (`input_ids`, `labels`, the index of the row each came from, its role in
it, its number of tokens with loss), and `encoding.json` beside it what was noticed. Neither writing nor reading needs
more memory than one chunk, the same rows give the same bytes, and both files appear under their names only when they
are whole.

What is noticed here and not earlier, because it needs the tokenizer:

    data.no_loss_tokens  error  rows in which nothing is left to learn (all labels masked, or cut away): left out
    data.no_answer_left  warn   the same in rows whose answers are compared or judged; also where one is empty
    data.truncated       warn   more than 1% of the examples were cut
    data.too_long        warn   rows dropped for their length (`too_long: drop`)
    data.no_eos          warn   uncut examples whose loss does not end with a token that ends an answer: the model
                                would learn to go on for ever
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from luthier.data.clean import empty_parts
from luthier.data.encode import Encoded, Encoder, Row, fit, loss_tokens
from luthier.data.roles import is_judged, roles_of
from luthier.data.templates import end_token_ids
from luthier.errors import InputError
from luthier.findings import Finding, Level

if TYPE_CHECKING:
    from luthier.data.settings import DataSettings

CHUNK_ROWS = 256  # rows tokenised in one call, examples in one record batch
SHOWN = 20  # rows named in facts and findings
TRUNCATED_LIMIT = 0.01

_FILES = ("examples.arrow", "encoding.json")

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("row", pa.int64()),
        ("role", pa.int8()),
        ("loss_tokens", pa.int32()),
    ]
)


class Encodings:
    """The encoded examples of one split: `len`, `[index]` and iteration, from a memory-mapped file.

    Attributes:
        lengths: (examples,) int64, tokens of each.
        loss_tokens: (examples,) int64, tokens with loss of each (never 0).
        row: (examples,) int64, index of the row each came from; the two sides of a preference row stand together.
        role: (examples,) int64, what each is to its row (`luthier.data.roles`).
        facts: what was counted, json-able; `facts["max_length"]` is the limit that was applied (None if none).
        findings: what was noticed.
    """

    def __init__(self, directory: Path):
        directory = Path(directory)
        try:
            stored = json.loads((directory / "encoding.json").read_text(encoding="utf-8"))
            reader = pa.ipc.open_file(pa.memory_map(str(directory / "examples.arrow")))
        except (OSError, ValueError, pa.ArrowInvalid) as error:
            raise InputError(f"no whole encoded split here: {error}", where=str(directory)) from None
        self.facts: dict[str, Any] = stored["facts"]
        self.findings = [Finding.model_validate(finding) for finding in stored["findings"]]
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._ids = [_lists(batch.column("input_ids")) for batch in batches]
        self._labels = [_lists(batch.column("labels")) for batch in batches]
        self.lengths = _joined([np.diff(offsets) for offsets, _ in self._ids])
        self.row = _joined([batch.column("row").to_numpy() for batch in batches])
        self.role = _joined([batch.column("role").to_numpy() for batch in batches])
        self.loss_tokens = _joined([batch.column("loss_tokens").to_numpy() for batch in batches])

        if len(self) != self.facts["examples"]:
            raise InputError(
                f"examples.arrow holds {len(self)} examples, encoding.json speaks of {self.facts['examples']}",
                where=str(directory),
                fix="encode the split again",
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Encoded:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        at = index - int(self._starts[chunk])
        parts = []
        for offsets, values in (self._ids[chunk], self._labels[chunk]):
            parts.append(values[offsets[at] : offsets[at + 1]].tolist())
        return {"input_ids": parts[0], "labels": parts[1]}

    def __iter__(self) -> Iterator[Encoded]:
        return (self[index] for index in range(len(self)))


def encode_split(
    rows: Iterable[Row],
    tokenizer: Any,
    settings: DataSettings,
    directory: Path,
    max_length: int | Literal["auto"] | None = None,
    *,
    context: int | None = None,
) -> Encodings:
    """Encode `rows` into `directory` (made if missing) and open the result.

    Args:
        rows: canonical rows; read once, in order (with "auto" also by index, as `luthier.data.rows.Rows` allows).
        tokenizer: a tokenizer of transformers.
        settings: how to read rows, where the loss is, what to do with rows that are too long.
        directory: gets `examples.arrow` and `encoding.json`; what it held of these is replaced.
        max_length: tokens per example; None for no limit; "auto" for `automatic_max_length` of these rows' lengths
            (use it for the train split, and what it found, `facts["max_length"]`, for the others).
        context: the most tokens that the model can take, for "auto"; None if it has no limit.

    Raises `InputError` with the row's place if a row cannot be encoded or `too_long: error` applies; what the
    directory held before is whole then.
    """
    if max_length == "auto":
        uncut = encode_split(rows, tokenizer, settings, directory)
        limit = automatic_max_length(uncut.lengths, context, cut=settings.too_long != "error")
        return limit_split(uncut, rows, tokenizer, settings, directory, limit)
    encoder = Encoder(tokenizer, settings)
    ends = end_token_ids(tokenizer)

    def examples() -> Iterator[tuple[int, Row, list[Encoded]]]:
        numbered = enumerate(rows)
        while chunk := list(islice(numbered, CHUNK_ROWS)):
            encoded = encoder.encode_rows(row for _, row in chunk)
            yield from ((index, row, parts) for (index, row), parts in zip(chunk, encoded, strict=True))

    return _write(examples(), ends, settings, Path(directory), max_length)


def limit_split(
    encodings: Encodings, rows: Any, tokenizer: Any, settings: DataSettings, directory: Path, max_length: int
) -> Encodings:
    """The same split cut to `max_length` without tokenising again; `rows[index]` names the rows in what is reported.

    `encodings` must have been made without a limit, and from the same rows; `directory` may be the one they lie in.
    """
    if encodings.facts["max_length"] is not None:
        raise InputError(f"these examples were already cut to {encodings.facts['max_length']} tokens")

    def examples() -> Iterator[tuple[int, Row, list[Encoded]]]:
        start = 0
        while start < len(encodings):
            stop = start + 1
            while stop < len(encodings) and encodings.row[stop] == encodings.row[start]:
                stop += 1
            index = int(encodings.row[start])
            yield index, rows[index], [encodings[i] for i in range(start, stop)]
            start = stop

    earlier = {key: encodings.facts[key] for key in _Counts.CARRIED}
    return _write(examples(), end_token_ids(tokenizer), settings, Path(directory), max_length, earlier)


def automatic_max_length(lengths: NDArray[np.int64], context: int | None, *, cut: bool = True) -> int:
    """What `max_length: auto` means: the 99th percentile of `lengths`, so that at most 1% is cut, within `context`.

    Args:
        lengths: (examples,) tokens of the uncut examples.
        context: the most tokens the model can take; None if it has no limit.
        cut: whether longer examples are allowed at all; if not, the longest counts instead of the percentile.
    """
    longest = int(np.percentile(lengths, 99 if cut else 100, method="higher")) if len(lengths) else 1
    return max(2, longest if context is None else min(longest, context))


def _write(
    examples: Iterable[tuple[int, Row, list[Encoded]]],
    ends: list[int],
    settings: DataSettings,
    directory: Path,
    max_length: int | None,
    earlier: dict[str, Any] | None = None,
) -> Encodings:
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length must be at least 2 tokens, got {max_length}", where="data.max_length")
    directory.mkdir(parents=True, exist_ok=True)
    counts = _Counts(ends, max_length, earlier)
    with written_aside(directory, _FILES) as aside:
        with pa.OSFile(str(aside[0]), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            kept: list[tuple[Encoded, int, int, int]] = []
            for index, row, uncut in examples:
                parts = counts.sift(uncut, fit(uncut, max_length, settings, row), row)
                roles = roles_of(row, len(parts))
                kept += [(e, index, role, loss_tokens(e)) for e, role in zip(parts, roles, strict=True)]
                if len(kept) >= CHUNK_ROWS:
                    writer.write_batch(_record_batch(kept))
                    kept = []
            if kept:
                writer.write_batch(_record_batch(kept))
        stored = {"facts": counts.facts(), "findings": [f.model_dump(mode="json") for f in counts.findings()]}
        aside[1].write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return Encodings(directory)


@contextmanager
def written_aside(directory: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Places beside the files of these names, which take the names at the end; nothing is left of them on an error."""
    aside = [directory / f".{name}.{os.getpid()}" for name in names]
    try:
        yield aside
        for path, name in zip(aside, names, strict=True):
            os.replace(path, directory / name)
    finally:
        for path in aside:
            path.unlink(missing_ok=True)


class _Counts:
    """What the stream of examples adds up to."""

    CARRIED = ("rows", "no_loss", "no_loss_rows", "no_answer", "no_answer_rows")  # from the uncut to the cut split

    def __init__(self, ends: list[int], max_length: int | None, earlier: dict[str, Any] | None):
        self.ends, self.max_length = set(ends), max_length
        self.rows = self.examples = self.tokens = self.learned = self.truncated = self.dropped = self.no_end = 0
        self.whole = self.unrolled = 0
        self.no_loss: int = earlier["no_loss"] if earlier else 0
        self.no_loss_rows: list[str] = list(earlier["no_loss_rows"]) if earlier else []
        self.no_answer: int = earlier["no_answer"] if earlier else 0
        self.no_answer_rows: list[str] = list(earlier["no_answer_rows"]) if earlier else []
        self.rows_before: int | None = earlier["rows"] if earlier else None

    def sift(self, uncut: list[Encoded], examples: list[Encoded], row: Row) -> list[Encoded]:
        """Count one row's examples before and after the limit; those to keep, which all have a loss."""
        self.rows += 1
        self.dropped += bool(len(examples) < len(uncut))
        self.unrolled += bool("messages" in row and len(uncut) > 1)
        learned = [loss_tokens(example) for example in examples]
        where = str(row.get("where", f"row {self.rows - 1}"))
        if examples and is_judged(row):
            if not all(learned) or empty_parts(row):
                self.no_answer += 1
                self.no_answer_rows += [where] if len(self.no_answer_rows) < SHOWN else []
                return []
        elif examples and not any(learned):
            self.no_loss += 1
            self.no_loss_rows += [where] if len(self.no_loss_rows) < SHOWN else []
            return []
        kept = [example for example, count in zip(examples, learned, strict=True) if count]
        self.examples += len(kept)
        self.tokens += sum(len(example["input_ids"]) for example in kept)
        self.learned += sum(learned)
        limit = math.inf if self.max_length is None else self.max_length
        complete = [e for e in uncut if len(e["input_ids"]) <= limit] if kept else []
        if len(examples) == len(uncut):
            self.truncated += len(uncut) - len(complete)
        self.whole += len(complete)
        self.no_end += sum(not e["labels"] or e["labels"][-1] not in self.ends for e in complete)
        return kept

    def facts(self) -> dict[str, Any]:
        return {
            "rows": self.rows if self.rows_before is None else self.rows_before,
            "examples": self.examples,
            "tokens": self.tokens,
            "loss_tokens": self.learned,
            "max_length": self.max_length,
            "truncated": self.truncated,
            "truncated_share": self.truncated / self.examples if self.examples else 0.0,
            "dropped_rows": self.dropped,
            "unrolled_rows": self.unrolled,
            "no_loss": self.no_loss,
            "no_loss_rows": self.no_loss_rows,
            "no_answer": self.no_answer,
            "no_answer_rows": self.no_answer_rows,
            "no_end": self.no_end,
        }

    def findings(self) -> list[Finding]:
        found = []
        if self.no_loss:
            shown = ", ".join(self.no_loss_rows[:5]) + (" ..." if self.no_loss > 5 else "")
            cause = "" if self.max_length is None else f" (with max_length {self.max_length})"
            message = f"{self.no_loss} rows have no token to learn from{cause}: {shown}"
            found.append(_finding("error", "no_loss_tokens", message, self.no_loss, 0))
        if self.no_answer:
            shown = ", ".join(self.no_answer_rows[:5]) + (" ..." if self.no_answer > 5 else "")
            cause = "is empty" if self.max_length is None else f"is empty or cut away (max_length {self.max_length})"
            message = f"{self.no_answer} rows of which an answer {cause} were left out: {shown}"
            found.append(_finding("warn", "no_answer_left", message, self.no_answer, 0))
        share = self.truncated / self.examples if self.examples else 0.0
        if share > TRUNCATED_LIMIT:
            message = f"{self.truncated} of {self.examples} examples ({share:.1%}) were cut to {self.max_length} tokens"
            found.append(_finding("warn", "truncated", message, share, TRUNCATED_LIMIT))
        if self.dropped:
            message = f"{self.dropped} rows had examples longer than {self.max_length} tokens, which were dropped"
            found.append(_finding("warn", "too_long", message, self.dropped, None))
        if self.no_end:
            message = f"{self.no_end} of {self.whole} examples do not end with a token that ends an answer"
            message += ", so the model will not learn to stop"
            found.append(_finding("warn", "no_eos", message, self.no_end / self.whole, 0))
        return found


def _finding(level: Level, code: str, message: str, value: Any, limit: Any) -> Finding:
    return Finding(level=level, code=f"data.{code}", message=message, value=value, limit=limit)


def _record_batch(kept: list[tuple[Encoded, int, int, int]]) -> pa.RecordBatch:
    examples, rows, roles, learned = zip(*kept, strict=True)
    lists = ([example[name] for example in examples] for name in ("input_ids", "labels"))  # type: ignore[literal-required]
    columns = zip([*lists, rows, roles, learned], _SCHEMA, strict=True)
    return pa.record_batch([pa.array(values, field.type) for values, field in columns], schema=_SCHEMA)


def _lists(column: pa.ListArray) -> tuple[NDArray[Any], NDArray[Any]]:
    """Offsets and values of a list column, without copying."""
    return column.offsets.to_numpy(), column.values.to_numpy()


def _joined(parts: list[NDArray[Any]]) -> NDArray[np.int64]:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
