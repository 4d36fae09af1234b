"""Rows into tokens with loss marks: `encode` for training, `prompt_ids` for generation, from the same code.

The law of this file: what training shows the model is what generation starts from, token by token,

    encode(row)[-1]["input_ids"]  ==  prompt_ids(row)  +  the answer  +  its end

so that a tuned model never meets at inference a prompt that differs from those it was tuned on. Everything after the
last token with loss is left out: it costs compute and teaches nothing.

How an answer is cut from the rest. Prompt and answer are tokenised as one text, as a tokenizer expects, and the
result is used if it begins with the ids of the prompt alone. Where it does not (a token reaches over the seam, such as
two line breaks that merge into one), the answer is tokenised by itself and put behind the prompt's ids, since that is
what happens at inference. Which of several answers in a conversation a token belongs to is read off its character
offsets; if a token reaches over the start of an earlier answer, or past answers are rendered differently from fresh
ones, or the tokenizer gives no offsets, the conversation is unrolled: one example per answer, each as at inference.

    form        tokens                                         loss (loss_on: assistant)
    text        begin + text + end                             all
    completion  begin + prompt + completion + end              completion + end
    messages    the chat template's text, nothing added        every answer with its end of turn
    preference  two examples, chosen then rejected             the last answer of each
    unpaired    one example, its verdict beside it             the last answer

`begin` and `end` are what the tokenizer itself puts before a text and its end-of-sequence token; a chat template
writes its own. `loss_on: last` keeps the last answer only, `loss_on: all` everything; where answers are compared or
judged (the last two forms), neither changes what the answer is. Labels are not shifted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from luthier.data.templates import ChatTemplate, Turn
from luthier.errors import InputError

if TYPE_CHECKING:
    from luthier.data.settings import DataSettings

Row = Mapping[str, Any]
IGNORED = -100  # the label of a token without loss


class Encoded(TypedDict):
    """One example: token ids and, of the same length, labels (the id itself where it carries loss, else -100)."""

    input_ids: list[int]
    labels: list[int]


def encode(row: Row, tokenizer: Any, settings: DataSettings, max_length: int | None = None) -> list[Encoded]:
    """The examples of one canonical `row`, cut to `max_length` tokens as `settings.too_long` says.

    An example may come back with no loss left after cutting; `loss_tokens` tells, and `store.encode_split` reports it.
    Raises `InputError` (with the row's `where`) if the template refuses the row, or `too_long: error` applies.
    """
    return Encoder(tokenizer, settings).encode(row, max_length)


def prompt_ids(row: Row, tokenizer: Any, settings: DataSettings) -> list[int]:
    """The ids that generation starts from: everything before the answer, with the generation prompt.

    The answer is the last message if it is the assistant's, or the `completion`; a conversation that ends with
    someone else is the prompt as a whole. A text row gives what the tokenizer begins every text with.
    """
    return Encoder(tokenizer, settings).prompt_ids(row)


def loss_tokens(example: Encoded) -> int:
    """How many tokens carry loss. The first never does: nothing stands before it to predict it from."""
    return sum(label != IGNORED for label in example["labels"][1:])


def fit(examples: list[Encoded], max_length: int | None, settings: DataSettings, row: Row) -> list[Encoded]:
    """The examples of one row, each no longer than `max_length`: cut, dropped or refused as `settings.too_long` says.

    Both sides of a preference row are dropped together. None of the lists given is changed.
    """
    longest = max((len(example["input_ids"]) for example in examples), default=0)
    if max_length is None or longest <= max_length:
        return examples
    if settings.too_long == "error":
        raise InputError(
            f"the row has {longest} tokens, more than max_length {max_length}",
            where=row.get("where"),
            fix="raise data.max_length, or set data.too_long to truncate or drop",
        )
    if settings.too_long == "drop":
        short = [example for example in examples if len(example["input_ids"]) <= max_length]
        return [] if "chosen" in row else short
    return [{"input_ids": e["input_ids"][:max_length], "labels": e["labels"][:max_length]} for e in examples]


@dataclass(frozen=True)
class _Draft:
    """An example before tokenisation: `turns` share one text (that of the last) unless they must be unrolled."""

    turns: tuple[Turn, ...]
    raw: bool = False  # not from a chat template: the tokenizer's own begin and end go around it
    all_labels: bool = False


class Encoder:
    """`encode` and `prompt_ids` for one tokenizer and one set of settings; build it once for many rows."""

    def __init__(self, tokenizer: Any, settings: DataSettings):
        self.tokenizer, self.settings = tokenizer, settings
        self.template = ChatTemplate(tokenizer)
        self.offsets = bool(getattr(tokenizer, "is_fast", False))
        self.begin = _begin(tokenizer)
        self.end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self._spaced = _puts_space_before(tokenizer)

    # -- what a caller asks

    def encode(self, row: Row, max_length: int | None = None) -> list[Encoded]:
        """As the function `encode`."""
        return fit(self.encode_rows([row])[0], max_length, self.settings, row)

    def encode_rows(self, rows: Iterable[Row]) -> list[list[Encoded]]:
        """The uncut examples of each row. Many rows at a time are faster: one call of the tokenizer for all."""
        drafts = [self._drafts(row) for row in rows]
        done = iter(self._finish([draft for part in drafts for draft in part]))
        return [[example for _ in part for example in next(done)] for part in drafts]

    def prompt_ids(self, row: Row) -> list[int]:
        """As the function `prompt_ids`."""
        if "text" in row:
            return list(self.begin)
        where = row.get("where")
        if (messages := self._conversation(row, "chosen" if "chosen" in row else "completion")) is not None:
            before = messages[:-1] if messages[-1].get("role") == "assistant" else messages
            if not before:
                raise InputError("the conversation has no message before the answer", where=where)
            return self._ids([self.template.prompt(before, row.get("tools"), where=where)])[0]
        return self.begin + self._ids([_string(row, "prompt")])[0]

    # -- rows to drafts

    def _conversation(self, row: Row, answer: str = "completion") -> list[dict[str, Any]] | None:
        """The row's messages (with `settings.system` in front if it has none), or None if the row is raw text."""
        where = row.get("where")
        if "messages" in row:
            messages = [*_messages(row["messages"], where)]
        else:
            prompt, reply = row.get("prompt"), row.get(answer)
            chat = self.settings.template == "chat" or isinstance(prompt, list) or isinstance(reply, list)
            if not chat:
                return None
            messages = _as_messages(prompt, "user", where)
            if reply is not None:
                messages += _as_messages(reply, "assistant", where)
        if self.settings.template == "none":
            raise InputError(
                "the row is a conversation, but data.template is 'none'", where=where, fix="set data.template to auto"
            )
        if self.settings.system is not None and messages[0].get("role") not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": self.settings.system})
        return messages

    def _drafts(self, row: Row) -> list[_Draft]:
        everything = self.settings.loss_on == "all"
        if "text" in row:
            text = _string(row, "text")
            return [_Draft((Turn("", text, ((0, len(text)),)),), raw=True, all_labels=True)]
        if "chosen" in row or "rejected" in row:
            return [draft for side in ("chosen", "rejected") for draft in self._answered(row, side, False, True)]
        if "desirable" in row:
            return self._answered(row, "completion", False, True)
        return self._answered(row, "completion", everything, self.settings.loss_on == "last")

    def _answered(self, row: Row, answer: str, everything: bool, last: bool) -> list[_Draft]:
        messages, where = self._conversation(row, answer), row.get("where")
        if messages is None:
            prompt = _string(row, "prompt")
            text = prompt + _string(row, answer)
            return [_Draft((Turn(prompt, text, ((len(prompt), len(text)),)),), raw=True, all_labels=everything)]
        tools = row.get("tools")
        if everything and messages[-1].get("role") != "assistant":
            text = self.template.text(messages, tools, where=where)
            return [_Draft((Turn("", text, ((0, len(text)),)),), all_labels=True)]
        turns = self.template.turns(messages, tools, last=last or everything, where=where)
        if all(turns[-1].text.startswith(turn.text) for turn in turns):
            return [_Draft(tuple(turns), all_labels=everything)]
        return [_Draft((turn,)) for turn in turns]

    # -- drafts to tokens

    def _finish(self, drafts: list[_Draft]) -> list[list[Encoded]]:
        """The examples of each draft; more than one only if the draft had to be unrolled."""
        if not drafts:
            return []
        texts, offsets = self._tokens([draft.turns[-1].text for draft in drafts])
        prompts = self._ids([draft.turns[-1].prompt for draft in drafts])
        done: list[list[Encoded]] = []
        for draft, ids, spans, prompt in zip(drafts, texts, offsets, prompts, strict=True):
            joined = ids[: len(prompt)] == prompt
            if len(draft.turns) > 1 and (spans is None or not joined or _straddles(spans, draft.turns[:-1])):
                alone = self._finish([_Draft((turn,)) for turn in draft.turns])
                done.append([example for part in alone for example in part])
            elif spans is not None and joined:
                done.append([self._example(draft, ids, _mask(spans, draft.turns, len(prompt)))])
            else:
                done.append([self._example(draft, *self._split(draft.turns[-1], prompt))])
        return done

    def _split(self, turn: Turn, prompt: list[int]) -> tuple[list[int], list[bool]]:
        """Tokens of a turn whose answer must be tokenised by itself, in pieces at the seams of `turn.learned`."""
        ids, mask = list(prompt), [False] * len(prompt)
        at = len(turn.prompt)
        for start, end in turn.learned:
            for piece, learned in ((turn.text[at:start], False), (turn.text[start:end], True)):
                new = self._continuation(piece)
                ids += new
                mask += [learned] * len(new)
            at = end
        return ids, mask

    def _example(self, draft: _Draft, ids: list[int], mask: list[bool]) -> Encoded:
        if draft.all_labels:
            mask = [True] * len(ids)
        kept = max((i for i, learned in enumerate(mask) if learned), default=len(ids) - 1) + 1
        ids, mask = ids[:kept], mask[:kept]
        if draft.raw:
            ids, mask = self.begin + ids, [draft.all_labels] * len(self.begin) + mask
            if ids[-1:] != self.end:
                ids, mask = ids + self.end, mask + [True] * len(self.end)
        return {"input_ids": ids, "labels": [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]}

    def _continuation(self, text: str) -> list[int]:
        """The ids of `text` as it stands behind other text: without a space that the tokenizer puts before a text."""
        if not text:
            return []
        if self._spaced:
            for anchor in ("\n", ":", "0", "a"):
                before, both = self._ids([anchor, anchor + text])
                if both[: len(before)] == before:
                    return both[len(before) :]
        return self._ids([text])[0]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]

    def _tokens(self, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]] | None]]:
        """Ids and character offsets of each text; offsets are None where the tokenizer has none."""
        if not self.offsets:
            return self._ids(texts), [None] * len(texts)
        out = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [list(ids) for ids in out["input_ids"]], list(out["offset_mapping"])


def _mask(spans: Sequence[tuple[int, int]], turns: Sequence[Turn], prompt_tokens: int) -> list[bool]:
    """Which tokens carry loss.

    At both ends of the last answer the index of a token counts and not its offset, because some tokenizers leave a
    space out of the offsets of the token that holds it.
    """
    mask = [False] * len(spans)
    last_start, last_end = len(turns[-1].prompt), len(turns[-1].text)
    position = 0
    for start, end in (span for turn in turns for span in turn.learned):
        while position < len(spans) and spans[position][0] < start:
            position += 1
        if start == last_start:
            position = prompt_tokens
        while position < len(spans) and (spans[position][0] < end or end == last_end):
            mask[position] = start < last_start or position >= prompt_tokens
            position += 1
    return mask


def _straddles(spans: Sequence[tuple[int, int]], turns: Sequence[Turn]) -> bool:
    """Whether a token begins before the start of an answer and ends behind it.

    Some tokenizers leave a leading space out of a token's offsets; a gap before a token is counted as its own.
    """
    starts = iter([turn.learned[0][0] for turn in turns if turn.learned])
    start = next(starts, None)
    before = 0
    for a, b in spans:
        while start is not None and start <= min(a, before):
            start = next(starts, None)
        if start is None:
            return False
        if min(a, before) < start < b:
            return True
        before = max(before, b)
    return False


def _begin(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text, found by looking."""
    plain = list(tokenizer("x", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("x")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def _puts_space_before(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a space of its own before a text (SentencePiece's dummy prefix), found by looking."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("x", add_special_tokens=False)["input_ids"])
    return bool(tokens) and str(tokens[0]).startswith(("▁", "Ġ", " "))


def _string(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise InputError(f"key {key!r} must hold a string, got {type(value).__name__}", where=row.get("where"))
    return value


def _messages(value: Any, where: str | None) -> Sequence[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) and "role" in m for m in value):
        raise InputError("'messages' must be a list of messages, each with a role", where=where)
    return value


def _as_messages(value: Any, role: str, where: str | None) -> list[dict[str, Any]]:
    """A string becomes one message of `role`; messages stay."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [*_messages(value, where)]
