"""What form a row has, and the same row in canonical columns.

    keys of a row (after data.columns)                  form          canonical columns
    chosen, rejected  (prompt)                          preference    prompt, chosen, rejected
    prompt, completion, label  (label true or false)    unpaired      prompt, completion, desirable
    messages  (tools, system)                           messages      messages, tools
    conversations  (tools, system)                      sharegpt      messages, tools
    instruction, output  (input, history, system)       alpaca        messages
    prompt, completion | prompt, response | question, answer    completion    prompt, completion
    text                                                text          text
    image                                               image         image

The first line that fits decides, from above; so a preference row may carry `messages` too. The first row of a source
fixes the form for all its rows: a source of mixed forms is refused, since a row of another form is nearly always a
mistake. Columns that a form does not use are kept in `extra`, where graders find them.

A column `label` makes an unpaired row, one answer that was found good or bad, only if the first row's is true or false
and `label_key` does not name it: labels of many other kinds (classes, scores) stand beside completions. From then on
any other value is an error. Tables of text may spell it `true` and `false`.

Alpaca becomes a conversation (instruction and input, an empty line between them, are what the user says), because
that is what instruction data mean to a chat model. To train a raw completion on it, say `schema: completion` and
`columns: {prompt: instruction, completion: output}`.

An image is a path, bytes or an array (see `luthier.data.pictures`); it is kept as the file's bytes in base64 text. What
a classifier learns of a text or image is the class that `label_key` names.

Preference rows keep a prompt of their own. Where both sides repeat the whole conversation, what they share becomes
the prompt, as in TRL's implicit-prompt form. Two equal sides are read, and left out where pairs are learned from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from luthier.data.conversations import Message, answered, conversation, plain, tools
from luthier.data.pictures import picture_text
from luthier.data.settings import DataSettings
from luthier.errors import InputError, did_you_mean

Row = dict[str, Any]

_NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "preference": (("chosen", "rejected"),),
    "unpaired": (("prompt", "completion", "label"), ("prompt", "response", "label"), ("question", "answer", "label")),
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction", "output"),),
    "completion": (("prompt", "completion"), ("prompt", "response"), ("question", "answer")),
    "text": (("text",),),
    "image": (("image",),),
}
CONTENT = ("text", "prompt", "completion", "desirable", "messages", "tools", "chosen", "rejected", "image")


def forms_of(row: Mapping[str, Any], settings: DataSettings) -> list[str]:
    """Every form whose columns `row` has, in the order of the table above."""
    names = {own: name for name, own in settings.columns.items()}
    keys = {names.get(key, key) for key in row}
    return [form for form, choices in _NEEDED.items() if any(keys.issuperset(choice) for choice in choices)]


def recognise(row: Mapping[str, Any], settings: DataSettings, *, answers: bool = True) -> str | None:
    """The form that `row` is taken for: the first that fits, or None; see `canonical` for `answers`."""
    fallback = None
    if not answers and any(settings.columns.get(name, name) in row for name in ("prompt", "question")):
        fallback = "completion"
    label = settings.columns.get("label", "label")
    judged = label != settings.label_key and _truth(row.get(label)) is not None
    return next((form for form in forms_of(row, settings) if form != "unpaired" or judged), fallback)


def canonical(row: Mapping[str, Any], settings: DataSettings, *, form: str, where: str, answers: bool = True) -> Row:
    """`row` in canonical columns, with its `id`; `where` (file and line) goes into every error.

    Args:
        row: as it was read; keys are column names. Not changed.
        settings: `columns`, `label_key` and `group_key` are used.
        form: as `recognise` gives it, or as the recipe names it.
        answers: whether a row must have an answer to learn. Without, a conversation may end with the user, and a
            completion may be a bare prompt: enough to generate from.
    """
    view = _View(row, settings, form, where, answers)
    content = _FORMS[form](view)
    identity = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    try:
        digest = hashlib.sha256(identity.encode("utf-8")).hexdigest()[:16]
    except UnicodeEncodeError:
        raise InputError("the text holds half of a surrogate pair (\\ud800 to \\udfff)", where=where) from None
    made: Row = {"where": where, "id": digest, **content}
    if settings.label_key is not None:
        made["label"] = view.named(settings.label_key, "label_key")
    if settings.group_key is not None:
        made["group"] = str(view.named(settings.group_key, "group_key"))
    if extra := view.extra():
        made["extra"] = extra
    return made


def unknown_form(row: Mapping[str, Any], where: str) -> InputError:
    """The error for a row that no form fits: what it has, what is missing from the nearest form."""
    keys = [str(key) for key in row]
    known = {name for choices in _NEEDED.values() for choice in choices for name in choice}
    for form, choices in _NEEDED.items():
        for choice in choices if form != "unpaired" else ():
            there = [name for name in choice if name in keys]
            if there and (missing := [name for name in choice if name not in keys]):
                rest = [key for key in keys if key not in known]
                fix = did_you_mean(missing[0], rest) if rest else f"the form {form} needs {' and '.join(choice)}"
                return InputError(f"the column {missing[0]!r} is missing beside {there[0]!r}", where=where, fix=fix)
    for key in keys:
        if (hint := did_you_mean(key, known)).startswith("did you mean"):
            return InputError(f"no form has the columns {', '.join(keys)}", where=where, fix=f"for {key!r}, {hint}")
    fix = "name them in data.columns, for instance {prompt: question, completion: reply}"
    return InputError(f"no form has the columns {', '.join(keys[:20]) or '(none)'}", where=where, fix=fix)


class _View:
    """A row under canonical column names; remembers which columns were used."""

    def __init__(self, row: Mapping[str, Any], settings: DataSettings, form: str, where: str, answers: bool):
        self.row, self.settings, self.form, self.where, self.answers = row, settings, form, where, answers
        self.used: set[str] = set()

    def own(self, name: str) -> str:
        """The row's own column for the canonical `name`."""
        return self.settings.columns.get(name, name)

    def place(self, name: str) -> str:
        return f"{self.where}, {self.own(name)}"

    def has(self, name: str) -> bool:
        own = self.own(name)
        return own in self.row and (name in self.settings.columns or own not in self.settings.columns.values())

    def get(self, name: str) -> Any:
        """The value under the canonical `name`, None if there is none."""
        if not self.has(name):
            return None
        self.used.add(self.own(name))
        return self.row[self.own(name)]

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            what = "is null" if self.has(name) else "is missing"
            others = [str(key) for key in self.row if key not in self.used]
            fix = did_you_mean(self.own(name), others) if others and not self.has(name) else None
            what = f"the column {what}, which rows of the form {self.form} need"
            raise InputError(what, where=self.place(name), fix=fix)
        return value

    def text(self, name: str) -> str:
        value = self.need(name)
        if not isinstance(value, str):
            raise InputError(f"expected text, got {type(value).__name__}", where=self.place(name))
        return value

    def optional_text(self, name: str) -> str:
        return self.text(name) if self.get(name) is not None else ""

    def named(self, key: str, setting: str) -> str | int:
        """The row's own column `key`, which the recipe names for a label or group: text or a whole number."""
        if key not in self.row:
            fix = did_you_mean(key, map(str, self.row))
            raise InputError(f"the column is missing; data.{setting} names it", where=f"{self.where}, {key}", fix=fix)
        self.used.add(key)
        value = plain(self.row[key], f"{self.where}, {key}")
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, (str, int)):
            return value
        what = f"expected text or a whole number, got {type(value).__name__ if value is not None else 'null'}"
        raise InputError(what, where=f"{self.where}, {key}")

    def extra(self) -> dict[str, Any]:
        rest = {key: value for key, value in self.row.items() if key not in self.used}
        return {str(key): plain(value, f"{self.where}, {key}", keep_empty=True) for key, value in rest.items()}


def _text(view: _View) -> Row:
    return {"text": view.text("text")}


def _image(view: _View) -> Row:
    return {"image": picture_text(view.need("image"), view.place("image"))}


def _completion(view: _View) -> Row:
    needed = 2 if view.answers else 1
    prompt_name, answer_name = next(
        (pair for pair in _NEEDED["completion"] if all(view.has(name) for name in pair[:needed])),
        ("prompt", "completion"),
    )
    prompt = view.need(prompt_name)
    if not view.answers and view.get(answer_name) is None:
        if isinstance(prompt, (list, tuple)):
            return _talk(view, conversation(prompt, view.place(prompt_name)), prompt_name)
        return {"prompt": view.text(prompt_name)}
    answer = view.need(answer_name)
    if isinstance(prompt, (list, tuple)) and isinstance(answer, (list, tuple)):
        before = conversation(prompt, view.place(prompt_name))
        if any(message["role"] == "assistant" for message in before):
            fix = "join both lists into one column messages and set data.loss_on to last"
            raise InputError("a prompt with earlier answers in it", where=view.place(prompt_name), fix=fix)
        return _talk(view, before + conversation(answer, view.place(answer_name)), answer_name)
    return {"prompt": view.text(prompt_name), "completion": view.text(answer_name)}


def _messages(view: _View) -> Row:
    return _talk(view, conversation(view.need("messages"), view.place("messages")), "messages")


def _sharegpt(view: _View) -> Row:
    return _talk(view, conversation(view.need("conversations"), view.place("conversations")), "conversations")


def _alpaca(view: _View) -> Row:
    said = [view.text("instruction"), view.optional_text("input")]
    answer = view.text("output")
    messages: list[Message] = []
    for index, turn in enumerate(view.get("history") or ()):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(part, str) for part in turn):
            raise InputError("expected a pair of texts, question and answer", where=f"{view.place('history')}[{index}]")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = "\n\n".join(part for part in said if part.strip())
    if not question:
        raise InputError("instruction and input are both empty", where=view.place("instruction"))
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _talk(view, messages, "output")


def _talk(view: _View, messages: list[Message], name: str) -> Row:
    """A row of messages, with the columns `system` and `tools` if the row has them."""
    system = view.optional_text("system")
    if system.strip() and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    if view.answers:
        answered(messages, view.place(name))
    offered = tools(view.get("tools"), view.place("tools"))
    return {"messages": messages, **({"tools": offered} if offered else {})}


def _preference(view: _View) -> Row:
    sides = {name: view.need(name) for name in ("chosen", "rejected")}
    if all(isinstance(side, str) for side in sides.values()):
        made: Row = {"prompt": view.need("prompt"), **sides}
        if not isinstance(made["prompt"], str):
            made["prompt"] = conversation(made["prompt"], view.place("prompt"))
    else:
        talks = {name: conversation(side, view.place(name)) for name, side in sides.items()}
        made = {"prompt": _shared_prompt(view, talks), **talks}
    offered = tools(view.get("tools"), view.place("tools"))
    return {**made, **({"tools": offered} if offered else {})}


def _unpaired(view: _View) -> Row:
    prompt_name, answer_name = next(
        (choice[:2] for choice in _NEEDED["unpaired"] if all(view.has(name) for name in choice[:2])),
        ("prompt", "completion"),
    )
    sides: Row = {}
    for name, own in (("prompt", prompt_name), ("completion", answer_name)):
        value = view.need(own)
        listed = isinstance(value, (list, tuple))
        sides[name] = conversation(value, view.place(own)) if listed else view.text(own)
    answer = sides["completion"]
    if isinstance(answer, list) and [message["role"] for message in answer] != ["assistant"]:
        raise InputError("expected one message of the assistant", where=view.place(answer_name))
    label = view.need("label")
    view.used.discard(view.own("label"))  # stays in `extra` too: graders may know it as a class
    desirable = _truth(label)
    if desirable is None:
        raise InputError(
            f"expected true or false (a good or a bad answer), got {str(label)[:40]!r}",
            where=view.place("label"),
            fix="write booleans, or set data.schema to completion if the label means something else",
        )
    offered = tools(view.get("tools"), view.place("tools"))
    return {**sides, "desirable": desirable, **({"tools": offered} if offered else {})}


def _truth(value: Any) -> bool | None:
    """The boolean that `value` is or, in a table of text, spells; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return bool(value) if type(value).__name__ in ("bool", "bool_") else None


def _shared_prompt(view: _View, talks: dict[str, list[Message]]) -> str | list[Message]:
    """The prompt of two conversations; takes what they repeat of it off both (in place)."""
    chosen, rejected = talks["chosen"], talks["rejected"]
    shared, most = 0, len(chosen) - 1 if chosen == rejected else min(len(chosen), len(rejected))
    while shared < most and chosen[shared] == rejected[shared]:
        shared += 1
    given = view.get("prompt")
    prompt: str | list[Message] | None = given if isinstance(given, str) else None
    if given is not None and prompt is None:
        prompt = conversation(given, view.place("prompt"))
    if shared and (chosen[0]["role"] != "assistant" or prompt is None):
        prompt = chosen[:shared]  # the sides tell the whole conversation; it says more than a bare prompt
        for talk in (chosen, rejected):
            del talk[:shared]
    if prompt is None:
        raise InputError("no prompt, and the two sides begin differently", where=view.place("prompt"))
    for name, talk in talks.items():
        if not talk or talk[0]["role"] != "assistant":
            fix = "both sides must share one prompt and then answer it"
            raise InputError("the answer does not begin with the assistant", where=view.place(name), fix=fix)
    return prompt


_FORMS: dict[str, Callable[[_View], Row]] = {
    "text": _text,
    "image": _image,
    "completion": _completion,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "preference": _preference,
    "unpaired": _unpaired,
}
