"""A row's prompt in the format that each term reads.

    auto                chat where the term's tokenizer has a chat template, else plain
    chat                the chat template, ready for the answer
    plain               the text as it is, behind what the tokenizer begins a text with
    Q {prompt} A        the text put into a frame, then plain

A base model reads text and a tuned one its template: the same question, and each in the words that it knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.data.encode import Encoder
from luthier.data.settings import DataSettings
from luthier.decode.mixture import Mixture
from luthier.errors import InputError, did_you_mean

FORMATS = ("auto", "chat", "plain")
FRAME = "{prompt}"


def check_format(name: str, given: str) -> str:
    """The format as given; `InputError` unless it is one."""
    if given not in FORMATS and FRAME not in given:
        fix = did_you_mean(given, FORMATS) + f", or text with {FRAME} in it"
        raise InputError(f"there is no format {given!r}", where=f"format of {name}", fix=fix)
    return given


def term_prompts(
    mixture: Mixture, rows: Sequence[Mapping[str, Any]], formats: Mapping[str, str], system: str | None = None
) -> dict[str, list[list[int]]]:
    """By term the token ids that each row's answer starts from.

    Args:
        rows: canonical rows with a `prompt`, or `messages` that end before an answer.
        formats: by term, or for all under `""`; `auto` where nothing is said.
        system: message for conversations that have none.

    Raises `InputError` for a term that is not there, a format that does not fit, a row without a prompt.
    """
    odd = formats.keys() - {"", *mixture.terms}
    if odd:
        raise InputError(f"there is no term {', '.join(sorted(odd))}", fix=f"terms are {', '.join(mixture.terms)}")
    made: dict[tuple[int, str], list[list[int]]] = {}
    found = {}
    for name, opened in mixture.opened.items():
        given = check_format(name, formats.get(name, formats.get("", "auto")))
        tokenizer = opened.tokenizer if opened.tokenizer is not None else mixture.lead.tokenizer
        if tokenizer is None:
            raise InputError("there is no tokenizer to make prompts with", where=name)
        key = id(tokenizer), given
        if key not in made:
            made[key] = _ids(tokenizer, rows, given, system, name)
        found[name] = made[key]
    return found


def _ids(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], given: str, system: str | None, name: str
) -> list[list[int]]:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if given == "chat" and not has_template:
        raise InputError("the tokenizer has no chat template", where=f"format of {name}", fix="take plain")
    chat = given == "chat" or (given == "auto" and has_template)
    template = "chat" if chat else "none"
    encoder = Encoder(tokenizer, DataSettings.model_validate({"source": "-", "template": template, "system": system}))
    found = []
    for row in rows:
        if not chat and (given != "auto" or "messages" not in row):
            text = prompt_text(row)
            row = {"prompt": text if FRAME not in given else given.replace(FRAME, text), "completion": ""}
        elif "text" in row:
            row = {"prompt": row["text"], "completion": ""}
        ids = encoder.prompt_ids(row)
        if not ids:
            raise InputError("the prompt is empty", where=row.get("where"))
        found.append(ids)
    return found


def prompt_text(row: Mapping[str, Any]) -> str:
    """The question of a row as text: its prompt, or its only message."""
    for key in ("prompt", "text"):
        if isinstance(row.get(key), str):
            return str(row[key])
    messages = [m for m in row.get("messages", ()) if m.get("role") != "assistant"]
    if len(messages) == 1 and isinstance(messages[0].get("content"), str):
        return str(messages[0]["content"])
    raise InputError(
        "a conversation of several messages has no plain text", where=row.get("where"), fix="take the format chat"
    )
