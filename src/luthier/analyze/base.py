"""The contract of an analysis: a pair of models goes in, a report comes out, and the pair is as it was.

    class Novelty(Analysis):
        n: int = 100
        def run(self, pair, rows=None, *, out=None, progress=None):
            ...
            return Report(summary={"texts": 100}, rows=[{"text": "...", "score": 1.7}, ...])

A report is json-able. `summary` holds the few figures that answer the question, `rows` what they were counted from,
`figures` pictures by name, if there are any. Given `out`, an analysis writes its rows there and the rest beside:

    samples.jsonl            a row a line
    samples.summary.json     the summary
    samples.NAME.svg         a picture

One that takes long keeps what it has in a `Journal` (`samples.jsonl.part`) and goes on from there when it is run again
with the same settings, models and rows. What an analysis needs of its caller beside the pair (a labeller, a grader, a
way to train) is an argument of its own, a callable with a plain default.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from luthier.errors import InputError
from luthier.methods import Method
from luthier.models.files import unwritten, write_text

Progress = Callable[[int, int], None]
Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Pair:
    """A base, what a tuning made of it, and their tokenizer.

    Attributes:
        base: the model before tuning; on the device where it shall run.
        tuned: the model after it.
        tokenizer: of the tuned model.
        base_tokenizer: of the base, where it was loaded with one of its own; an analysis that needs the same tokens
            checks it against the other.
    """

    base: nn.Module
    tuned: nn.Module
    tokenizer: Any
    base_tokenizer: Any = None


@dataclass(frozen=True)
class Report:
    """What came out.

    Attributes:
        summary: json-able; the figures that answer the question.
        rows: json-able; what the summary was counted from.
        figures: name -> an SVG as text.
    """

    summary: dict[str, Any]
    rows: Sequence[Mapping[str, Any]] = ()
    figures: Mapping[str, str] = field(default_factory=dict)

    def save(self, out: Path) -> list[Path]:
        """Write rows to `out`, summary and figures beside; returns the paths. Each file is written aside and renamed;
        the rows come last, so where they stand, all stands. Raises `CrashError` if the disk is full, `InputError` if
        nothing can be written there."""
        pictures = {out.with_suffix(f".{name}.svg"): text for name, text in self.figures.items()}
        summary = json.dumps(self.summary, indent=2, ensure_ascii=False) + "\n"
        texts = pictures | {out.with_suffix(".summary.json"): summary, out: "".join(map(_line, self.rows))}
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritten(error, out) from None
        for path, text in texts.items():
            write_text(path, text)
        return list(texts)


class Analysis(Method):
    """Base of all analyses. Verb: `run`."""

    room: ClassVar[str] = "analyze"

    def run(
        self, pair: Pair, rows: Rows | None = None, *, out: Path | None = None, progress: Progress | None = None
    ) -> Report:
        """Analyse `pair`. Neither model is changed.

        Args:
            rows: canonical rows (`luthier.data`), for an analysis that looks at data.
            out: where its rows are written; the file must not be there yet.
            progress: called with (done, of all).
        """
        raise NotImplementedError


class Journal:
    """Rows of a long analysis as they come, in a file beside the final one.

    Args:
        out: the final file, which must not be there yet; None keeps nothing.
        key: json-able; what the rows depend on (settings, hashes of models and rows).

    Attributes:
        rows: those that an earlier run with the same key left; a line that broke off in the middle is dropped.

    Raises `InputError` if `out` is there, its journal belongs to another key, or nothing can be written there, and
    `CrashError` if the disk is full; rows that were added before are kept.
    """

    def __init__(self, out: Path | None, key: Mapping[str, Any]):
        self.rows: list[dict[str, Any]] = []
        self.path = None if out is None else out.with_name(out.name + ".part")
        if out is None or self.path is None:
            return
        if out.exists():
            raise InputError("it is there already", where=str(out), fix="name a file that is not, or remove it")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            there = self.path.read_bytes() if self.path.exists() else b""
            whole = there[: there.rfind(b"\n") + 1]
            if not whole and not _line(key).encode().startswith(there):
                raise ValueError
            lines = [json.loads(line) for line in whole.splitlines()]
            if lines and lines[0] != json.loads(_line(key)):
                fix = "remove it, or name another file"
                raise InputError("it was begun with other settings, models or rows", where=str(self.path), fix=fix)
            self.rows = lines[1:]
            if self.path.exists():
                os.truncate(self.path, len(whole))
        except ValueError:
            raise InputError("it is no journal of an analysis", where=str(self.path), fix="move it away") from None
        except OSError as error:
            raise unwritten(error, out) from None
        if not lines:
            self.add(key)

    def add(self, row: Mapping[str, Any]) -> None:
        """One more row, in its file when this returns."""
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(_line(row))
            except OSError as error:
                raise unwritten(error, self.path) from None

    def finish(self) -> None:
        """The rows stand in the final file; nothing is to be gone on with."""
        if self.path is not None:
            self.path.unlink()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
