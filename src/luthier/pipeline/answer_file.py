"""A file of answers that takes its name when it is whole, and that a broken run can be gone on with.

    answers.jsonl.part         answers so far, a line each; renamed to answers.jsonl at the end
    answers.jsonl.part.json    what they depend on: settings, and the files of each model

    file = AnswerFile(Path("answers.jsonl"), about, resume=True)
    rows = file.unanswered(rows)                       those that have answers are held against them and left out
    file.write(answers(mixture, asked, rows, first=file.done))

Draws depend on the seed and on a prompt's number, and the rows of a chunk share batches. So a run goes on from the last
whole chunk (`luthier.pipeline.generating.CHUNK`), and its file is byte for byte that of a run that did not break off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from luthier.errors import CrashError, InputError
from luthier.models.files import is_full, unwritten, write_text
from luthier.pipeline.generating import CHUNK, Asked, shown

_OF_MODELS = ("*.safetensors", "*.bin", "*.gguf", "*config.json", "delta.json", "tokenizer*")


def about_run(asked: Asked, **more: Any) -> dict[str, Any]:
    """What the answers depend on, json-able: all that was asked, `more`, and of each model in a folder the names, sizes
    and times of its files. A model that is named otherwise (a package, the hub) is told by its name alone."""
    named = {name: term.model for name, term in asked.decoder.terms().items()}
    models = {name: _files(Path(str(model))) for name, model in named.items()}
    settings = {**vars(asked), "decoder": asked.decoder.model_dump(mode="json")}
    return json.loads(json.dumps({"settings": settings, **more, "models": models}, default=str))


def _files(place: Path) -> list[list[Any]]:
    found = [place] if place.is_file() else sorted({path for kind in _OF_MODELS for path in place.glob(kind)})
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in found]


class AnswerFile:
    """Answers on their way to `output`.

    Args:
        output: must not be there yet.
        about: what the answers depend on, json-able (`about_run`).
        resume: go on with what a broken run left, if it left anything.

    Attributes:
        done: rows that are answered already.

    Raises `InputError` if `output` is there, if a broken run left answers and `resume` is off, and if those were made
    with other settings or models.
    """

    def __init__(self, output: Path, about: Mapping[str, Any], *, resume: bool = False):
        self.output, self.about, self.done = output, about, 0
        self.part, self.beside = output.with_name(f"{output.name}.part"), output.with_name(f"{output.name}.part.json")
        if output.exists():
            raise InputError("this place is taken", where=str(output), fix="name a new file")
        if self.part.exists() and not resume:
            fix = "go on with --resume, or move it away"
            raise InputError("holds the answers of a run that broke off", where=str(self.part), fix=fix)
        if self.part.exists():
            self._same(about)

    def _same(self, about: Mapping[str, Any]) -> None:
        now = _flat(about)
        try:
            then = _flat(json.loads(self.beside.read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            what = f"does not say what the answers in {self.part.name} were made with"
            raise InputError(what, where=str(self.beside), fix="move both away, and begin anew") from None
        other = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
        if other:
            what = f"belongs to a run that differs in {', '.join(other)}"
            raise InputError(what, where=str(self.part), fix="repeat that run's command, or move it away")

    def unanswered(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Rows behind those that are answered, whose prompts are held against their answers at once; a chunk that is
        not whole is cut off. Raises `InputError` at a row that is not the one that was answered."""
        rows = iter(rows)
        if not self.part.exists():
            return rows
        with self.part.open("rb") as file:
            whole = sum(line.endswith(b"\n") for line in file) // CHUNK * CHUNK
            file.seek(0)
            for number in range(1, whole + 1):
                if not _answers(file.readline(), next(rows, None)):
                    fix = "give the same prompts in the same order, or move it away"
                    raise InputError(f"answer {number} is of another prompt", where=str(self.part), fix=fix)
            end = file.tell()
        os.truncate(self.part, end)
        self.done = whole
        return rows

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add all `records` and give the file its name; each is in the file when the next is asked for. Raises
        `CrashError` if the disk is full, `InputError` if nothing can be written there; what is written stays."""
        records = iter(records)
        first = list(islice(records, 1))  # an error before it leaves no file behind
        if not self.part.exists():
            write_text(self.beside, json.dumps(self.about, indent=1, ensure_ascii=False) + "\n")
        try:
            with self.part.open("a", encoding="utf-8") as file:
                for record in chain(first, records):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    file.flush()
                os.fsync(file.fileno())
            self.part.replace(self.output)
            self.beside.unlink()
        except OSError as error:
            if is_full(error):
                what = f"the disk is full; what was answered is in {self.part}, and --resume goes on from there"
                raise CrashError(what) from None
            raise unwritten(error, self.output) from None


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, as a person is told of them."""
    found = {f"the files of {name}": files for name, files in about["models"].items()}
    return found | about["settings"] | {key: about[key] for key in about if key not in ("settings", "models")}


def _answers(line: bytes, row: Mapping[str, Any] | None) -> bool:
    """Whether `line` holds an answer to `row`."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    if row is None or not isinstance(record, dict):
        return False
    asked = json.loads(json.dumps([row.get("id"), shown(row)]))
    return [record.get("id"), record.get("prompt")] == asked
