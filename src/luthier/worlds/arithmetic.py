"""Arithmetic: a small exact world of chat questions with one right answer each.

    rows("add", count=2, seed=0)     "Add 27 and 5."          -> "32"
    grade(row, "32")                 1.0; anything else is 0.0

Eight skills of about the same length and difficulty. The tiny model that the package ships (`luthier.worlds.tiny`)
knows four of them from its pre-training (`LEARNED`: add, copy, larger, reverse) and has never seen the other four
(`UNSEEN`: sort, smaller, subtract, swap). So a tuning teaches an unseen skill, and a learned one shows what was
forgotten. Every row is drawn from an explicit seed, no question comes twice in one source, and `part` keeps training
and test questions apart by construction (`luthier.worlds.parts`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from luthier.errors import InputError, did_you_mean
from luthier.worlds.parts import belongs, checked_count, checked_seed

# How many draws in a row may bring nothing new before a source is taken to be exhausted.
PATIENCE = 2000


def _two(rng: random.Random) -> tuple[int, int]:
    return rng.randrange(100), rng.randrange(100)


def _digits(rng: random.Random) -> list[str]:
    return [str(rng.randrange(10)) for _ in range(rng.choice((3, 4)))]


def add(rng: random.Random) -> tuple[str, str]:
    """Two numbers below 100, summed."""
    a, b = _two(rng)
    return f"Add {a} and {b}.", str(a + b)


def subtract(rng: random.Random) -> tuple[str, str]:
    """The smaller of two numbers below 100 taken from the larger."""
    a, b = sorted(_two(rng))
    return f"Subtract {a} from {b}.", str(b - a)


def larger(rng: random.Random) -> tuple[str, str]:
    """The larger of two different numbers below 100."""
    a = rng.randrange(100)
    b = (a + rng.randrange(1, 100)) % 100
    return f"Which is larger, {a} or {b}?", str(max(a, b))


def smaller(rng: random.Random) -> tuple[str, str]:
    """The smaller of two different numbers below 100."""
    a = rng.randrange(100)
    b = (a + rng.randrange(1, 100)) % 100
    return f"Which is smaller, {a} or {b}?", str(min(a, b))


def copy(rng: random.Random) -> tuple[str, str]:
    """Three or four digits, as they are."""
    digits = _digits(rng)
    return f"Copy {' '.join(digits)}.", " ".join(digits)


def reverse(rng: random.Random) -> tuple[str, str]:
    """Three or four digits, last first."""
    digits = _digits(rng)
    return f"Reverse {' '.join(digits)}.", " ".join(reversed(digits))


def sort(rng: random.Random) -> tuple[str, str]:
    """Three or four digits in rising order."""
    digits = _digits(rng)
    return f"Sort {' '.join(digits)}.", " ".join(sorted(digits))


def swap(rng: random.Random) -> tuple[str, str]:
    """Three or four digits with the first and the last exchanged."""
    digits = _digits(rng)
    return f"Swap the ends of {' '.join(digits)}.", " ".join([digits[-1], *digits[1:-1], digits[0]])


LEARNED: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "add": add,
    "copy": copy,
    "larger": larger,
    "reverse": reverse,
}
UNSEEN: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "smaller": smaller,
    "sort": sort,
    "subtract": subtract,
    "swap": swap,
}
SKILLS = {**LEARNED, **UNSEEN}


def rows(
    skill: str | Sequence[str] = "add", count: int = 400, seed: int = 0, part: str = "all"
) -> Iterator[dict[str, Any]]:
    """Chat rows of one skill, or of several in turn.

    Args:
        skill: a name of `SKILLS`, or a list of names (row i is of skill i modulo their number).
        count: how many rows, all with different questions.
        seed: the same seed gives the same rows; another seed draws anew.
        part: `train` and `test` never share a question; `all` draws from both.

    Yields:
        `{"messages": [user, assistant], "skill": name, "answer": text}`.

    Raises:
        InputError: the skill or part is unknown, or there are fewer than `count` different questions.
    """
    names = [skill] if isinstance(skill, str) else list(skill)
    for name in names:
        if name not in SKILLS:
            raise InputError(f"unknown skill {name!r}", where="skill", fix=did_you_mean(str(name), SKILLS))
    if not names:
        raise InputError("no skill is named", where="skill", fix=did_you_mean("", SKILLS))
    count, seed = checked_count(count), checked_seed(seed)
    rng = random.Random(f"{seed}/{','.join(names)}")
    seen: set[str] = set()
    fruitless = 0
    while len(seen) < count:
        name = names[len(seen) % len(names)]
        question, answer = SKILLS[name](rng)
        if question in seen or not belongs(question, part):
            fruitless += 1
            if fruitless > PATIENCE:
                raise InputError(
                    f"{name} has only about {len(seen)} different questions in part {part!r}, {count} were asked",
                    where="count",
                    fix="ask for fewer rows",
                )
            continue
        seen.add(question)
        fruitless = 0
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"messages": messages, "skill": name, "answer": answer}


def pairs(
    skill: str | Sequence[str] = "add", count: int = 400, seed: int = 0, part: str = "all"
) -> Iterator[dict[str, Any]]:
    """Preference rows: the questions of `rows`, with the right answer and a wrong one, the right one with a digit more.

    Yields `{"prompt": [user], "chosen": [assistant], "rejected": [assistant]}`; arguments and errors as of `rows`.
    """
    for row in rows(skill, count, seed, part):
        question, right = row["messages"]
        wrong = {"role": "assistant", "content": f"{right['content']} {right['content'][0]}"}
        yield {"prompt": [question], "chosen": [right], "rejected": [wrong]}


def grade(row: Mapping[str, Any], answer: str) -> float:
    """1.0 if `answer` is the row's own last message, white space around it aside, else 0.0."""
    return float(answer.strip() == str(row["messages"][-1]["content"]).strip())
