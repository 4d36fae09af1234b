"""Everyday questions: does a tuned model still answer what anybody knows?

    rows(count=40, part="test")     "What is the capital of Italy?"  ->  "The capital of Italy is Rome."
    grade(row, "It is Rome.")       1.0: the key word is there

Narrow tuning often narrows a chat model: taught to answer riddles with a number, a small one soon answers every
question with a number. Prose perplexity hardly notices; the questions here do. The test part measures it, and rows of
the training part, mixed into the tuning data, are the oldest remedy: rehearsal. The questions are our own; their
answers are common knowledge, so this is a check of what is kept, not a measure of what a model knows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from luthier.errors import InputError
from luthier.worlds.parts import belongs, checked_count, checked_seed


def _questions() -> list[tuple[str, str, list[str]]]:
    """(question, answer in full, right key words) of `everyday.tsv`, in its order."""
    text = resources.files("luthier.worlds").joinpath("everyday.tsv").read_text(encoding="utf-8")
    lines = [line.split("\t") for line in text.splitlines()[1:]]
    return [(question, answer, keys.split("|")) for question, answer, keys in lines]


def rows(count: int = 40, seed: int = 0, part: str = "all", system: str | None = None) -> Iterator[dict[str, Any]]:
    """Chat rows of `count` different everyday questions in seeded order.

    Yields `{"messages": [system?, user, assistant], "keys": [words]}`; `part` as in `luthier.worlds.parts`. Raises
    `InputError` if the part has fewer than `count` questions.
    """
    count, seed = checked_count(count), checked_seed(seed)
    questions = [entry for entry in _questions() if belongs(entry[0], part)]
    if count > len(questions):
        raise InputError(
            f"part {part!r} has {len(questions)} everyday questions, {count} were asked",
            where="count",
            fix="ask for fewer rows",
        )
    random.Random(f"{seed}/everyday").shuffle(questions)
    opening = [{"role": "system", "content": system}] if system else []
    for question, answer, keys in questions[:count]:
        messages = [*opening, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"messages": messages, "keys": keys}


def grade(row: Mapping[str, Any], answer: str) -> float:
    """1.0 if one of the row's key words stands in `answer` as a whole word, in any case; else 0.0."""
    keys = {**row, **(row.get("extra") or {})}.get("keys")
    if not keys:
        raise InputError(
            "the row lacks keys", where=row.get("where"), fix="make rows with luthier.worlds.everyday:rows"
        )
    return float(any(re.search(rf"(?<!\w){re.escape(key)}(?!\w)", answer, re.IGNORECASE) for key in keys))
