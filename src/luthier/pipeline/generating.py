"""Answers as the command `luthier generate` asks for them: rows in, one record each out, chunk by chunk.

A decoder comes as settings (`{method: eft, base: ..., tuned: ...}`), its models are loaded once, and rows stream
through: only a chunk of them is held at a time, so a file of any length can be answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from luthier.data.read import read_rows
from luthier.data.settings import DataSettings
from luthier.decode.base import Decoder
from luthier.decode.generate import Tell, generate
from luthier.decode.mixture import Mixture
from luthier.decode.opening import open_decoder
from luthier.decode.prompts import prompt_text, term_prompts
from luthier.errors import InputError, did_you_mean
from luthier.methods import build, find
from luthier.pipeline.recipe_text import override, parse, read_text

CHUNK = 256  # rows that are held at a time
_KEYS = {"decoder", "formats", "system", "max_new_tokens", "stop", "sampling"}


@dataclass(frozen=True)
class Asked:
    """What to answer with.

    Attributes:
        decoder: the settings.
        formats: prompt format by term, `""` for all (`luthier.decode.prompts`).
        system: message for conversations that have none.
        max_new_tokens, stop: as of `luthier.decode.generate`.
        sampling: settings of `luthier.decode.sampling.Sampler`.
    """

    decoder: Decoder
    formats: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


def read_decoder(source: Path | Mapping[str, Any], settings: Sequence[str] = ()) -> Asked:
    """A decoder recipe, from a file or a mapping, with settings of the decoder such as `weight=0.5` laid over it.

        decoder: {method: eft, base: big, tuned: small-chat, tuned_base: small}
        formats: {base: plain, tuned: chat}
        max_new_tokens: 128
        sampling: {temperature: 0.7, top_p: 0.9}

    Raises `InputError` with the file and key for what it may not say.
    """
    name, value = "decoder", dict(source) if isinstance(source, Mapping) else {}
    if isinstance(source, Path):
        name, text = read_text(source, {})
        value, _ = parse(text, name)
    if unknown := value.keys() - _KEYS:
        raise InputError(f"unknown key {sorted(unknown)[0]!r}", where=name, fix=f"keys are {', '.join(sorted(_KEYS))}")
    if "decoder" not in value:
        raise InputError("no decoder is named", where=name, fix="say decoder: {method: eft, ...}")
    given = value["decoder"]
    made = {"method": given} if isinstance(given, str) else dict(given)
    for text in settings:
        override(made, text)
    try:
        decoder = build("decode", made)
        assert isinstance(decoder, Decoder)
        return Asked(decoder, **{key: part for key, part in value.items() if key != "decoder"})
    except ValidationError as error:
        complaints = error.errors(include_url=False)
        first = next((one for one in complaints if one["type"] == "extra_forbidden"), complaints[0])
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = [*find("decode", str(made["method"])).model_fields]
            raise InputError(f"unknown key {key!r}", where=name, fix=did_you_mean(key, known)) from None
        raise InputError(first["msg"].removeprefix("Value error, ").rstrip("."), where=f"{name}.{key}") from None
    except ValueError as error:
        raise InputError(str(error).rstrip("."), where=name) from None


def prompt_rows(source: str, lines: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows with prompts: of a file of rows, or of lines, each a JSON row or a prompt as it stands.

    Args:
        source: a file, or the name of where `lines` come from.
    """
    if lines is None and not source.endswith(".txt"):
        settings = DataSettings.model_validate({"source": source})
        yield from read_rows(source, settings, answers=False)
        return
    if lines is None:
        try:
            with open(source, encoding="utf-8") as file:
                yield from prompt_rows(source, file)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot be read: {error}", where=source) from None
        return
    for number, line in enumerate(lines, start=1):
        text, where = line.rstrip("\r\n"), f"{source}:{number}"
        if not text.strip():
            raise InputError("the prompt is empty", where=where)
        row: Any = {"prompt": text}
        if text.lstrip().startswith("{"):
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(f"not valid JSON: {error.msg}", where=where) from None
            if not isinstance(row, dict) or not {"prompt", "messages", "text"} & row.keys():
                raise InputError("the row has neither prompt nor messages", where=where)
        yield {"id": str(number), **row, "where": where}


def open_asked(asked: Asked, *, dtype: str = "auto", device: str = "cpu") -> Mixture:
    """The decoder with its models loaded."""
    return open_decoder(asked.decoder, dtype=dtype, device=device)


def answers(
    mixture: Mixture,
    asked: Asked,
    rows: Iterable[Mapping[str, Any]],
    *,
    logprobs: bool = False,
    batch_tokens: int = 4096,
    first: int = 0,
    progress: Callable[[int], None] = lambda done: None,
    tell: Tell | None = None,
) -> Iterator[dict[str, Any]]:
    """One record for each row, in order: id, prompt, text, finished, tokens, and of each term the log-probabilities.

    Args:
        logprobs: keep the log-probability (nats) of every token, by term and of the mixture.
        first: how many rows were answered before these; draws depend on a row's number.
        progress: called with the number of rows done.
        tell: called with tokens as they are drawn (`luthier.decode.generate`).
    """
    source, done = iter(rows), first
    lead = next(iter(mixture.terms))
    while chunk := list(islice(source, CHUNK)):
        prompts = term_prompts(mixture, chunk, asked.formats, asked.system)
        before = done
        found = generate(
            mixture,
            mixture.lead.tokenizer,
            prompts[lead],
            own_prompts=prompts,
            max_new_tokens=asked.max_new_tokens,
            stop=tuple(asked.stop),
            batch_tokens=batch_tokens,
            keep_logprobs=logprobs,
            progress=lambda count, _, before=before: progress(before + count),  # type: ignore[misc]
            tell=tell,
            first_number=before,
            **asked.sampling,
        )
        for row, answer in zip(chunk, found, strict=True):
            record = {"id": row.get("id"), "prompt": shown(row), "text": answer.text, "finished": answer.finished}
            record["tokens"] = answer.ids
            yield record | ({"logprobs": answer.logprobs} if logprobs else {})
        done += len(chunk)
    if not done:
        raise InputError("there is no prompt", where="prompts")


def shown(row: Mapping[str, Any]) -> Any:
    """The prompt of a row as its record has it: text, or messages."""
    return row["messages"] if "messages" in row else prompt_text(row)
