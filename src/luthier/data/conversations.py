"""Conversations in OpenAI's and ShareGPT's form, checked message by message and made one form: OpenAI's.

A message has a `role`, a `content` and whatever else its author's template may want (`name`, `tool_calls`,
`tool_call_id`, `reasoning_content`, ...); all of that is kept, empty keys aside, because only the template knows what
it reads. Content given as a list of text parts becomes one string; a part that is no text is refused, and so are marks
that some trainers read as "do not learn this message" (`weight: 0`, `train: false`): passing them over would teach
what their author wanted kept out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

from luthier.errors import InputError, did_you_mean

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

# ShareGPT's names of speakers, gathered from the data sets in use, and the role each one stands for. The words of
# `function_call` are the assistant's: a call, or a list of calls, as JSON.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard"), "assistant"),
    "system": "system",
    "function_call": "call",
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}
_UNLEARNED = {"weight": (None, 1), "train": (None, True), "training": (None, True)}


def conversation(value: Any, where: str) -> list[Message]:
    """Messages in OpenAI's form from `value`: a list in either form, or such a list as JSON text.

    `where` names the file, line and key of the list. Raises `InputError` if there is no message or one is broken.
    """
    entries = _as_list(value, where)
    if not entries:
        raise InputError("the list of messages is empty", where=where)
    return [_message(entry, f"{where}[{index}]") for index, entry in enumerate(entries)]


def answered(messages: Sequence[Message], where: str) -> None:
    """Raise `InputError` unless the assistant speaks, and speaks to somebody."""
    roles = [message["role"] for message in messages if message["role"] not in ("system", "developer")]
    if "assistant" not in roles:
        raise InputError("the assistant never speaks, so there is nothing to learn", where=where)
    if roles[0] == "assistant" and len(roles) == len(messages):
        raise InputError("the first message is the assistant's: there is no prompt before it", where=where)


def tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """The tools of a conversation: a list of mappings, or such a list as JSON text; None if there is none."""
    if value is None or value == "" or value == []:
        return None
    entries = _as_list(value, where)
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise InputError(f"expected a tool (a mapping), got {type(entry).__name__}", where=f"{where}[{index}]")
    return [plain(entry, f"{where}[{index}]", keep_empty=True) for index, entry in enumerate(entries)] or None


def plain(value: Any, where: str, *, keep_empty: bool = False) -> Any:
    """`value` in the types of JSON: dates as text, numbers that are not finite as null, tuples and arrays as lists.

    Keys without a value are left out of mappings unless `keep_empty`: tables fill in every key that any row has.
    Raises `InputError` for what JSON cannot carry, such as bytes and images.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        kept = ((key, entry) for key, entry in value.items() if keep_empty or entry is not None)
        return {str(key): plain(entry, f"{where}.{key}", keep_empty=keep_empty) for key, entry in kept}
    if isinstance(value, (list, tuple)):
        return [plain(entry, f"{where}[{index}]", keep_empty=keep_empty) for index, entry in enumerate(value)]
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return plain(value.tolist(), where, keep_empty=keep_empty)
    what = f"a value of type {type(value).__name__} cannot be kept in a row of text"
    raise InputError(what, where=where, fix="leave the column out, or write it as text")


def _as_list(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise InputError("expected a list, got text that is not JSON", where=where) from None
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise InputError(f"expected a list, got {type(value).__name__}", where=where)
    return list(value)


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, Mapping):
        raise InputError(f"expected a message (a mapping), got {type(entry).__name__}", where=where)
    if "from" in entry and "role" not in entry:
        return _shared(entry, where)
    role = entry.get("role")
    if role not in ROLES:
        what = "the message has no role" if role is None else f"unknown role {role!r}"
        raise InputError(what, where=f"{where}.role", fix=_role_fix(role, ROLES) if role is not None else None)
    _refuse_unlearned(entry, where)
    message: Message = {"role": role, "content": _content(entry, role, where)}
    for key, value in entry.items():
        if key == "tool_calls":
            if calls := _calls(value, f"{where}.tool_calls"):
                message[key] = calls
        elif key not in message and key not in _UNLEARNED and value is not None:
            message[str(key)] = plain(value, f"{where}.{key}")
    return message


def _role_fix(role: Any, known: Sequence[str]) -> str:
    if isinstance(role, str) and role in SPEAKERS:
        return "in ShareGPT's form the keys are 'from' and 'value', in OpenAI's the roles are user and assistant"
    return did_you_mean(str(role), known)


def _content(entry: Mapping[str, Any], role: str, where: str) -> str | None:
    content = entry.get("content")
    if content is None:
        if role == "assistant" and (entry.get("tool_calls") or entry.get("function_call")):
            return None
        near = [key for key in entry if key not in ("role", "content")]
        what = "the message has no content" if "content" not in entry else "content is null without tool_calls"
        fix = did_you_mean("content", near) if "content" not in entry and near else None
        raise InputError(what, where=f"{where}.content", fix=fix)
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise InputError(f"expected text, got {type(content).__name__}", where=f"{where}.content")
    return "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(text, str):
        return text
    if kind == "text":
        raise InputError(f"expected text, got {type(text).__name__}", where=f"{where}.text")
    raise InputError(f"a part of kind {kind!r} cannot be learned from, only text can", where=where)


def _refuse_unlearned(entry: Mapping[str, Any], where: str) -> None:
    for key, harmless in _UNLEARNED.items():
        if key in entry and entry[key] not in harmless:
            fix = "leave the key out and choose what is learned with data.loss_on"
            raise InputError(f"the mark {key}: {entry[key]} on a message is not supported", where=where, fix=fix)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    calls = []
    for index, call in enumerate(_as_list(value, where)):
        place = f"{where}[{index}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError("a tool call needs a function with a name", where=place)
        arguments = function.get("arguments")
        if arguments is not None and not isinstance(arguments, (str, Mapping)):
            raise InputError(
                f"expected a mapping or JSON text, got {type(arguments).__name__}", where=f"{place}.arguments"
            )
        calls.append(plain(call, place))
    return calls


def _shared(entry: Mapping[str, Any], where: str) -> Message:
    """One turn of ShareGPT's form: `from` and `value`."""
    speaker, value = entry["from"], entry.get("value")
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        fix = did_you_mean(str(speaker), SPEAKERS)
        raise InputError(f"unknown speaker {speaker!r}", where=f"{where}.from", fix=fix)
    _refuse_unlearned(entry, where)
    if not isinstance(value, str):
        what = "the turn has no value" if value is None else f"expected text, got {type(value).__name__}"
        raise InputError(what, where=f"{where}.value")
    if role != "call":
        return {"role": role, "content": value}
    try:
        calls = json.loads(value)
    except ValueError:
        raise InputError("a function_call must be JSON with name and arguments", where=f"{where}.value") from None
    listed = calls if isinstance(calls, list) else [calls]
    wrapped = [{"type": "function", "function": c} if isinstance(c, dict) and "name" in c else c for c in listed]
    return {"role": "assistant", "content": None, "tool_calls": _calls(wrapped, f"{where}.value")}
