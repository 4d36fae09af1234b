"""Held-out rows by construction: a question belongs to the training part or to the test part, whatever the seed.

Generators draw at random, and small worlds repeat themselves: two seeds of "add two numbers below 100" share about
every tenth question, so "another seed" is no held-out set. Here the question itself decides: a quarter of all
questions, chosen by their hash, are test questions for ever. Two sources that name different parts cannot share a
row, and neither has to know of the other.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

from luthier.errors import InputError, did_you_mean

Part = Literal["train", "test", "all"]


def part_of(question: str) -> Literal["train", "test"]:
    """The part that `question` belongs to: one in four, by the SHA-256 of its text, is a test question."""
    digest = hashlib.sha256(question.encode("utf-8")).digest()
    return "test" if digest[0] % 4 == 0 else "train"


def belongs(question: str, part: str) -> bool:
    """Whether `question` lies in `part`; `"all"` holds every question. An unknown part raises `InputError`."""
    if part not in get_args(Part):
        raise InputError(f"unknown part {part!r}", where="part", fix=did_you_mean(str(part), get_args(Part)))
    return part in ("all", part_of(question))


def checked_count(count: object, where: str = "count") -> int:
    """`count` as a whole number of at least 1; anything else raises `InputError`."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"expected a whole number of rows, 1 or more, got {count!r}", where=where)
    return count


def checked_seed(seed: object) -> int:
    """`seed` as a whole number; anything else raises `InputError`."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"expected a whole number, got {seed!r}", where="seed")
    return seed
