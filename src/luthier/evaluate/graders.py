"""Graders: is this answer right? Pure functions (row, answer) -> a number from 0 (wrong) to 1 (right), or a bool.

    exact           the expected answer and nothing else; white space around it does not count
    contains        the expected answer stands somewhere in it, as whole words, upper or lower case
    number          its last number equals the expected answer's last number: 1,234.50 is 1234.5, 6/4 is 3/2
    choice-letter   the letter it settles on: "B", "(b)", "B) Paris", "the answer is B"
    json            it is JSON (a code fence around it is allowed) and means the same as the expected JSON

    module:function your own: `def grade(row, answer)`, or a scorer in the style of reasoning-gym, recognised by the
                    name of its second argument: `def score(answer, entry)`, where `entry` holds the row's extra
                    columns, and `question` and `answer` where those columns have none

The expected answer is the row's own: its completion, its last message if that is the assistant's, or the chosen side
of a preference. A row without one is refused by all graders of the first five names.

An answer never makes a grader of ours fail: what cannot be read is wrong. A grader of yours that raises, or returns
something else than a number from 0 to 1, stops the evaluation and names the row.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from luthier.errors import InputError, did_you_mean

Row = Mapping[str, Any]
Grader = Callable[[Row, str], Any]


def expected(row: Row) -> str | None:
    """The answer that `row` itself gives; None if it gives none (plain text, or a conversation left open)."""
    answer: Any = None
    if "messages" in row:
        answer = row["messages"]
    else:
        answer = row.get("completion", row.get("chosen"))
    if isinstance(answer, list):
        last = answer[-1] if answer else {}
        answer = last.get("content") if last.get("role") == "assistant" else None
        if isinstance(answer, list):  # OpenAI's form of text in parts
            answer = "".join(str(part.get("text", "")) for part in answer)
    return answer if isinstance(answer, str) else None


def question(row: Row) -> str:
    """What was asked, for people to read: the prompt, the last message before the answer, or the text's beginning."""
    messages = row.get("messages", row.get("prompt"))
    if isinstance(messages, list):
        before = [m for m in messages if m.get("role") != "assistant"]
        content = before[-1].get("content") if before else ""
        return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return str(messages if messages is not None else row.get("text", ""))


def exact(row: Row, answer: str) -> bool:
    """Whether `answer` is the expected answer, white space at its ends aside."""
    return _expected(row).strip() == answer.strip()


def contains(row: Row, answer: str) -> bool:
    """Whether the expected answer stands in `answer` as whole words; case and the kind of white space do not count."""
    wanted, text = _squeezed(_expected(row)), _squeezed(answer)
    at = text.find(wanted)
    while at >= 0:
        end = at + len(wanted)
        if not (_joined(text[at - 1 : at], wanted[0]) or _joined(wanted[-1], text[end : end + 1])):
            return True
        at = text.find(wanted, at + 1)
    return False


def number(row: Row, answer: str) -> bool:
    """Whether the last number of `answer` equals the last number of the expected answer."""
    wanted = last_number(_expected(row))
    if wanted is None:
        raise InputError("the expected answer holds no number", where=row.get("where"), fix="choose another grader")
    return last_number(answer) == wanted


def choice_letter(row: Row, answer: str) -> bool:
    """Whether `answer` settles on the expected letter."""
    wanted = letter(_expected(row))
    if wanted is None:
        raise InputError(
            f"the expected answer {_expected(row)[:40]!r} names no letter from A to J",
            where=row.get("where"),
            fix="choose another grader",
        )
    return letter(answer) == wanted


def json_equal(row: Row, answer: str) -> bool:
    """Whether `answer` is JSON that means the same as the expected JSON (1 is 1.0; true is not 1)."""
    try:
        wanted = _parsed(_expected(row))
    except ValueError as error:
        raise InputError(f"the expected answer is not JSON: {error}", where=row.get("where")) from None
    try:
        return _same(_parsed(answer), wanted)
    except (ValueError, RecursionError):
        return False


GRADERS: dict[str, Grader] = {
    "exact": exact,
    "contains": contains,
    "number": number,
    "choice-letter": choice_letter,
    "json": json_equal,
}


# -- finding and calling them


def import_callable(name: str) -> Callable[..., Any]:
    """The function that `module:function` names; `InputError` if it cannot be imported or called."""
    from luthier.data.read import import_callable as load

    return load(name)


def check_name(name: str) -> str:
    """`name` if it is one of `GRADERS` or looks like module:function; else `ValueError` with the nearest names."""
    module, _, attribute = name.partition(":")
    if name not in GRADERS and not (module and attribute):
        raise ValueError(f"unknown grader {name!r}; {did_you_mean(name, [*GRADERS, 'module:function'])}")
    return name


def find_grader(name: str, load: Callable[[str], Callable[..., Any]] = import_callable) -> Grader:
    """The grader called `name`, whose results are checked: it returns a float in [0, 1] or raises `InputError`."""
    try:
        grader = GRADERS[name] if check_name(name) in GRADERS else load(name)
    except ValueError as error:
        raise InputError(str(error)) from None
    call = _as_scorer(grader) if name not in GRADERS and _wants_entry(grader) else grader

    def checked(row: Row, answer: str) -> float:
        try:
            value = call(row, answer)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the grader {name} failed on this row: {type(error).__name__}: {error}", where=_where(row)
            ) from error
        return _share(value, name, row)

    return checked


def _share(value: Any, name: str, row: Row) -> float:
    """`value` as a number from 0 to 1. numpy's numbers and truth values pass through their `item`."""
    plain = value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value
    if not isinstance(plain, bool | int | float) or not (0 <= plain <= 1) or math.isnan(plain):
        raise InputError(
            f"the grader {name} returned {str(value)[:60]} ({type(value).__name__})",
            where=_where(row),
            fix="return true or false, or a number from 0 to 1",
        )
    return float(plain)


def _wants_entry(grader: Callable[..., Any]) -> bool:
    try:
        names = list(inspect.signature(grader).parameters)
    except (TypeError, ValueError):
        return False
    return len(names) >= 2 and names[1] == "entry"


def _as_scorer(scorer: Callable[..., Any]) -> Grader:
    """A grader from a scorer (answer, entry) with entry {"question", "answer", "metadata", ...}."""

    def grader(row: Row, answer: str) -> Any:
        entry = {"question": question(row), "answer": expected(row), **(row.get("extra") or {})}
        return scorer(answer, entry)

    return grader


def _expected(row: Row) -> str:
    answer = expected(row)
    if answer is None or not answer.strip():
        raise InputError(
            "the row has no expected answer to grade against",
            where=_where(row),
            fix="give it a completion or a last assistant message, or name a grader of your own",
        )
    return answer


def _where(row: Row) -> str | None:
    return row.get("where") or row.get("id")


# -- reading answers

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"(?:(?<![\w)\]])-)?(?:{_DIGITS})(?:/[0-9]+(?![0-9.]))?")

# What an answer's letter looks like, the surest sign first. Within one sign the last one counts: people correct
# themselves, and so do models.
_LETTERS = (
    re.compile(r"^[\s*_(\[\"']*([A-Ja-j])[\s*_)\]\"'.:]*$"),  # nothing but the letter
    re.compile(r"(?i:answer|option|choice)[\s*_]{0,6}(?i:is|:|=)?[\s*_:(\[\"']{0,9}([A-J])(?![\w'])(?! [a-z])"),
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*([A-J])\s*\}"),
    re.compile(r"^[\s*_(\[]*(?:([A-J])[*_]*[).:\]]|([a-j])\))"),  # B) Paris
    re.compile(r"[(\[]([A-J])[)\]]"),
    re.compile(r"(?<![\w'])([B-HJ])(?![\w'])|(?<![\w'])([AI])(?![\w'])(?!\s+[a-z])"),
)


def last_number(text: str) -> Fraction | None:
    """The last number in `text`, exactly; None if there is none. A minus after a letter or digit is a dash."""
    for found in reversed(_NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))):
        top, _, bottom = found.replace(",", "").partition("/")
        if len(top) + len(bottom) > 4000:
            continue  # longer than Python reads, and than anything meant as a number
        if not bottom.strip("0") and bottom:
            continue  # nothing can be divided by zero
        return Fraction(top) / int(bottom or 1)
    return None


def letter(text: str) -> str | None:
    """The letter from A to J that `text` settles on; None if it settles on none."""
    for sign in _LETTERS:
        found = [a for groups in sign.finditer(text) for a in groups.groups() if a]
        if found:
            return found[-1].upper()
    return None


def _squeezed(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _joined(left: str, right: str) -> bool:
    """Whether two neighbouring characters belong to one word: both digits or letters of a script that has cases."""
    return all(c.isdigit() or c.lower() != c.upper() for c in (left, right)) if left and right else False


def _parsed(text: str) -> Any:
    text = text.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3].partition("\n")[2]

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, bool) or isinstance(two, bool):
        return one is two
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(_same(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)
