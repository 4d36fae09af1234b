"""What a row says, reduced to what the checks compare; and the checks that need one row only.

    row_text          all words of a row, for copies and private data
    content_key       64 bits of the text, lower-cased, runs of white space made one space: equal for copies
    word_hashes       one 32-bit number for each word; `ngrams` makes windows of them
    empty_parts       which answers are empty
    private_data      how often e-mail addresses, phone numbers, card numbers, keys, ... occur

Only such numbers are kept while a data set is prepared, never the texts. 64 bits are enough: among a hundred million
rows the chance that any two different texts share a key is below one in three thousand.

The patterns for private data are meant to make somebody look, not to be complete: each is bounded in length, so that
no text makes it slow, and card and account numbers must pass their own checksums (Luhn; ISO 7064 mod 97).
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Scripts without spaces between words count letter by letter: kana, Han, Thai, Lao.
_LETTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff"
_WORD = re.compile(rf"[{_LETTERS}]|[^\W{_LETTERS}]+")
_ODD = np.uint64(0x9E3779B97F4A7C15)


def row_text(row: Mapping[str, Any], *, system: bool = True) -> str:
    """All that is said in a canonical row, a line for each part; without system messages unless `system`."""
    parts: list[str] = []
    for name in ("text", "prompt", "completion", "messages", "chosen", "rejected"):
        if name in row:
            parts += _said(row[name], system)
    return "\n".join(parts)


def prompt_text(row: Mapping[str, Any]) -> str:
    """What is said before the last answer, without system messages; empty for a text row."""
    if "messages" in row:
        answers = [index for index, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        return "\n".join(_said(row["messages"][: answers[-1]], False))
    return "\n".join(_said(row.get("prompt", ""), False))


def _said(value: str | Sequence[Mapping[str, Any]], system: bool) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = []
    for message in value:
        if not system and message["role"] in ("system", "developer"):
            continue
        parts.append(message.get("content") or "")
        if message.get("tool_calls"):
            parts.append(json.dumps(message["tool_calls"], ensure_ascii=False, sort_keys=True))
    return parts


def normalised(text: str) -> str:
    """`text` lower-cased, with every run of white space made one space and none at the ends."""
    return " ".join(text.lower().split())


def content_key(text: str) -> int:
    """64 bits of the normalised text: equal for texts that differ in case and white space only."""
    return key_of(normalised(text))


def key_of(text: str) -> int:
    """64 bits of the very characters of `text` (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def mixed(values: NDArray[np.uint64], seed: int = 0) -> NDArray[np.uint64]:
    """64-bit numbers scattered by the finaliser of splitmix64; a bijection, another one for every `seed`."""
    with np.errstate(over="ignore"):
        x = np.asarray(values, dtype=np.uint64) + np.uint64((seed + 1) * int(_ODD) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def word_hashes(text: str) -> NDArray[np.uint64]:
    """(words,) one number for each word of the lower-cased text, punctuation left out."""
    sound = text.lower().encode("utf-8", "replace").decode("utf-8")  # without halves of surrogate pairs
    words = map(itemgetter(0), _WORD.finditer(sound))
    return mixed(np.fromiter(map(zlib.crc32, map(str.encode, words)), dtype=np.uint64))


def ngrams(words: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """(words - size + 1,) one 64-bit number for each window of `size` words; empty if there are fewer words."""
    count = len(words) - size + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    windows = np.zeros(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for start in range(size):
            windows = windows * _ODD + words[start : start + count]
    return mixed(windows)


def empty_parts(row: Mapping[str, Any]) -> list[str]:
    """The keys of a canonical row under which there is nothing to learn: blank texts, blank answers."""
    found: list[str] = []
    for key in ("text", "completion", "messages", "chosen", "rejected"):
        if isinstance(row.get(key), str):
            found += [] if row[key].strip() else [key]
            continue
        for index, message in enumerate(row.get(key, ())):
            silent = not (message.get("content") or "").strip() and not message.get("tool_calls")
            if message["role"] == "assistant" and silent:
                found.append(f"{key}[{index}].content")
    return found


# -- private data


def _luhn(digits: str) -> bool:
    numbers = [int(digit) for digit in digits if digit.isdigit()]
    doubled = [sum(divmod(2 * number, 10)) for number in numbers[-2::-2]]
    return 13 <= len(numbers) <= 19 and any(numbers) and (sum(numbers[-1::-2]) + sum(doubled)) % 10 == 0


def _iban(text: str) -> bool:
    compact = "".join(text.split())
    moved = compact[4:] + compact[:4]
    return 15 <= len(compact) <= 34 and int("".join(str(int(letter, 36)) for letter in moved)) % 97 == 1


def _address(text: str) -> bool:
    return all(int(part) < 256 for part in text.split("."))


# Whatever consists of digits is looked for only in runs of digits and what may stand between them.
_DIGITS = re.compile(r"[+(]?\d[\d .()-]{5,}\d", re.ASCII)
_IN_DIGITS: dict[str, tuple[str, Callable[[str], bool] | None]] = {
    "phone": (r"(?<!\d)(?:\+\d{1,3}(?:[ .()-]{0,2}\d){6,12}|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4})(?!\d)", None),
    "card": (r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)", _luhn),
    "address": (r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])", _address),
    "social_security": (r"(?<!\d)\d{3}-\d{2}-\d{4}(?!\d)", None),
}
_ANYWHERE: dict[str, tuple[str, Callable[[str], bool] | None]] = {
    "email": (r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}", None),
    "account": (r"(?<![A-Z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Z0-9])", _iban),
    "key": (
        r"\bsk-[\w-]{20,200}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,255}|-----BEGIN [A-Z ]{0,20}KEY",
        None,
    ),
}
_MARKS = {"email": ("@",), "key": ("sk-", "AKIA", "gh", "-----BEGIN")}  # without these, no need to look


def _compiled(patterns: dict[str, tuple[str, Callable[[str], bool] | None]]) -> list[tuple[str, re.Pattern[str], Any]]:
    return [(kind, re.compile(pattern, re.ASCII), check) for kind, (pattern, check) in patterns.items()]


_COMPILED, _COMPILED_DIGITS = _compiled(_ANYWHERE), _compiled(_IN_DIGITS)


def private_data(text: str) -> dict[str, int]:
    """How often each kind of private data seems to occur in `text`; kinds that do not are left out."""
    found: dict[str, int] = {}
    places = [(text, _COMPILED)] + [(run[0], _COMPILED_DIGITS) for run in _DIGITS.finditer(text)]
    for place, patterns in places:
        for kind, pattern, check in patterns:
            if kind in _MARKS and not any(mark in place for mark in _MARKS[kind]):
                continue
            if count := sum(check is None or check(hit[0]) for hit in pattern.finditer(place)):
                found[kind] = found.get(kind, 0) + count
    return found
