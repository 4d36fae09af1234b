"""Chat templates: what text a conversation is to the model, and which characters of it the model itself wrote.

Every chat model carries its own template, a small Jinja program, and training must render a conversation exactly as
serving will, or the tuned model meets prompts it has never seen. So the tokenizer's own template is used and nothing
else, and every answer is described by what happens at inference:

    prompt    the conversation so far, with the template's generation prompt: what generation starts from
    text      the same conversation with the answer in it, up to the end of the turn: prompt + what is generated
    learned   the characters of `text` that carry loss

Some templates mark the assistant's words themselves ({% generation %} ... {% endgeneration %}); those marks are
honoured. Most do not; then the answer is what `text` has beyond `prompt`, end-of-turn token included, white space
behind it excluded, because generation stops before that white space.

A template may render a past answer differently from a fresh one (Qwen3 drops earlier thinking, others write the end
token only after the last turn). One rendering of the whole conversation would then teach answers in a form that never
occurs at inference; `Turn`s let the caller notice and train each answer by itself. Where a complete answer does not
even begin with the template's own generation prompt (DeepSeek-R1 opens a thought in the one and deletes it from the
other), the answer is taken from the message and only its ending from the template.

Whatever the template silently leaves out (a system message, tools, tool calls) is refused with a clear sentence.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from luthier.errors import InputError

Message = Mapping[str, Any]

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SENTINEL = "Luthier0Answer"  # letters and a digit: no template changes it, no tokenizer has it as a special token


@dataclass(frozen=True)
class Turn:
    """One answer in its place.

    Attributes:
        prompt: what generation starts from.
        text: `prompt`, the answer and its end of turn, without white space after it.
        learned: (start, end) character ranges of `text` that this answer's loss covers, in order.
    """

    prompt: str
    text: str
    learned: tuple[tuple[int, int], ...]


class ChatTemplate:
    """The chat template of one tokenizer. Build it once per data set: it looks the template up and keeps it."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def prompt(self, messages: Sequence[Message], tools: Any = None, *, where: str | None = None) -> str:
        """`messages` (whose last is not the answer) as the text that generation starts from."""
        return self._render(messages, tools, where, prompt=True)[0]

    def text(self, messages: Sequence[Message], tools: Any = None, *, where: str | None = None) -> str:
        """The whole conversation as one text, as the template writes it."""
        return self._render(messages, tools, where)[0]

    def turns(
        self, messages: Sequence[Message], tools: Any = None, *, last: bool = False, where: str | None = None
    ) -> list[Turn]:
        """One `Turn` for each assistant message, in order; only the last one if `last`.

        Raises `InputError` if there is no assistant message, or the template refuses or leaves out something.
        """
        answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if not answers:
            raise InputError("no message has the role 'assistant', so there is nothing to learn", where=where)
        if answers[0] == 0:
            raise InputError("the first message is the assistant's: there is no prompt before it", where=where)
        return [self._turn(messages, index, tools, where) for index in (answers[-1:] if last else answers)]

    def _turn(self, messages: Sequence[Message], index: int, tools: Any, where: str | None) -> Turn:
        prompt = self._render(messages[:index], tools, where, prompt=True)[0]
        whole, marks = self._render(messages[: index + 1], tools, where)
        if not whole.startswith(prompt):
            return self._rebuilt(messages, index, tools, prompt, where)
        text = prompt + whole[len(prompt) :].rstrip()
        if marks is None:
            learned: tuple[tuple[int, int], ...] = ((len(prompt), len(text)),)
        else:  # a template that marks words decides alone, even if it marks none
            own = ((max(a, len(prompt)), min(b, len(text))) for a, b in marks)
            learned = tuple((a, b) for a, b in own if a < b)
        calls = messages[index].get("tool_calls") or ()
        self._must_contain(whole[len(prompt) :], [_function_name(c) for c in calls], "a tool call of the answer", where)
        return Turn(prompt, text, learned)

    def _rebuilt(self, messages: Sequence[Message], index: int, tools: Any, prompt: str, where: str | None) -> Turn:
        """A turn whose rendering does not begin with its prompt: the message's own words plus the template's ending."""
        content = messages[index].get("content")
        if not isinstance(content, str) or messages[index].get("tool_calls"):
            raise InputError(
                f"the chat template writes answer {index} differently from its own generation prompt", where=where
            )
        probe = [*messages[:index], {"role": "assistant", "content": _SENTINEL}]
        head, found, ending = self._render(probe, tools, where)[0].partition(_SENTINEL)
        if not found:
            raise InputError("the chat template leaves out the assistant's words", where=where)
        opened = prompt[_shared(head, prompt) :]  # what only the generation prompt has
        answer = content.strip()
        if opened.strip() and answer.startswith(opened.strip()):
            answer = answer[len(opened.strip()) :].lstrip()
        elif opened.count("<think>") > opened.count("</think>"):
            raise InputError(
                f"generation starts inside {opened.strip()!r}, but the answer at message {index} has no such thought",
                where=where,
                fix=f"begin the answers with {opened.strip()!r} or use a template that does not open it",
            )
        text = (prompt + answer + ending).rstrip()
        return Turn(prompt, text, ((len(prompt), len(text)),))

    def _render(
        self, messages: Sequence[Message], tools: Any, where: str | None, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """The rendered text, and the character ranges of the assistant's words if the template marks them."""
        source = self._source(tools, where)
        plain = [_plain(message) for message in messages]
        marks: list[tuple[int, int]] | None = None
        for attempt in (_parsed_arguments(plain), plain):
            try:
                if not prompt and _MARK.search(source):
                    rendered: Any = render_jinja_template(
                        [attempt],
                        tools=tools or None,
                        chat_template=source,
                        return_assistant_tokens_mask=True,
                        **self.tokenizer.special_tokens_map,
                    )
                    (text,), (marks,) = rendered
                else:
                    text = self.tokenizer.apply_chat_template(
                        attempt, tools=tools or None, tokenize=False, add_generation_prompt=prompt
                    )
                break
            except TypeError as error:  # some templates want the arguments of a call as text, others as a mapping
                if attempt is plain or attempt == plain:
                    raise self._refusal(error, messages, tools, where) from None
            except (jinja2.TemplateError, ValueError, KeyError) as error:
                raise self._refusal(error, messages, tools, where) from None
        system = [m["content"] for m in plain if m.get("role") == "system" and isinstance(m.get("content"), str)]
        self._must_contain(text, system, "the system message", where)
        self._must_contain(text, [_function_name(tool) for tool in tools or ()], "a tool", where)
        return text, marks

    def _source(self, tools: Any, where: str | None) -> str:
        try:
            return self.tokenizer.get_chat_template(tools=tools or None)
        except (ValueError, AttributeError):
            raise InputError(
                "the rows are conversations, but the model's tokenizer has no chat template",
                where=where,
                fix="name one with model.chat_template, or use an instruction-tuned base model",
            ) from None

    def _refusal(self, error: Exception, messages: Sequence[Message], tools: Any, where: str | None) -> InputError:
        fix = None
        if any(m.get("role") == "system" for m in messages):
            rest = [m for m in messages if m.get("role") != "system"]
            try:
                self.tokenizer.apply_chat_template(rest, tools=tools or None, tokenize=False)
                fix = "leave out the system message (also data.system), or put its words into the first user message"
            except Exception:  # the system message is not what it minds
                fix = None
        kind = "the chat template is not valid Jinja" if isinstance(error, jinja2.TemplateSyntaxError) else None
        roles = ", ".join(str(m.get("role")) for m in messages)
        return InputError(
            f"{kind or 'the chat template refuses this conversation'} ({roles}): {error}", where=where, fix=fix
        )

    @staticmethod
    def _must_contain(text: str, parts: Sequence[str], what: str, where: str | None) -> None:
        """Templates drop what they do not know without a word; that must not go unnoticed."""
        squeezed = None
        for part in parts:
            if part.strip() in text:
                continue
            squeezed = squeezed if squeezed is not None else "".join(text.split())
            if "".join(part.split()) not in squeezed:
                raise InputError(
                    f"the chat template leaves out {what} ({part.strip()[:60]!r})",
                    where=where,
                    fix="use a chat template that writes it (model.chat_template), or take it out of the rows",
                )


def end_token_ids(tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's own end token and what its chat template ends a turn with.

    Sorted and without doubles; empty if the tokenizer knows no end at all.
    """
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if getattr(tokenizer, "chat_template", None):
        question = {"role": "user", "content": "x"}
        try:
            turn = ChatTemplate(tokenizer).turns([question, {"role": "assistant", "content": _SENTINEL}])[0]
        except InputError:
            return sorted(ends)
        ending = turn.text.rpartition(_SENTINEL)[2].strip()
        ids = tokenizer(ending, add_special_tokens=False)["input_ids"] if ending else []
        known = getattr(tokenizer, "added_tokens_decoder", {})
        if ids and (ids[0] in known or ids[0] in tokenizer.all_special_ids):
            ends.add(int(ids[0]))
    return sorted(ends)


def _plain(message: Message) -> dict[str, Any]:
    """A message without empty keys; content given as a list of text parts becomes one string."""
    plain = {key: value for key, value in message.items() if value is not None}
    content = plain.get("content")
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        plain["content"] = "".join(str(part.get("text", "")) for part in content)
    return plain


def _parsed_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI writes the arguments of a call as JSON text; most templates expect the mapping itself."""
    if not any(message.get("tool_calls") for message in messages):
        return messages
    copies = copy.deepcopy(messages)
    for message in copies:
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                try:
                    value = json.loads(arguments)
                except ValueError:
                    continue
                if isinstance(value, dict):
                    function["arguments"] = value
    return copies


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _function_name(entry: Any) -> str:
    """The name in a tool or tool call, with or without OpenAI's wrapper around the function."""
    if not isinstance(entry, Mapping):
        return ""
    function = entry.get("function", entry)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""
