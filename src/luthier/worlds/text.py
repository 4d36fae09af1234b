"""Ordinary prose, to see whether a tuned model still reads as well as its base.

    rows("scripture", count=40)      passages of the King James Bible (1769), shipped with the package: no tiny-model
                                     pre-training has read them, so they are held out for it
    rows("story", count=40)          paragraphs of Jules Verne's "In the Year 2889", which travels in the package
                                     `reasoning-gym`

Both texts are out of copyright (the King James text is under a royal patent for printing inside the United Kingdom).
A row is `{"text": passage}`; the task `perplexity` reads it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from importlib import resources

from luthier.errors import InputError, did_you_mean
from luthier.worlds.parts import checked_count, checked_seed


def _scripture() -> list[str]:
    text = resources.files("luthier.worlds").joinpath("scripture.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _story() -> list[str]:
    try:
        from reasoning_gym.data import read_data_file  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise InputError(
            "the story comes in the package reasoning-gym, which is not installed",
            where="source",
            fix="pip install reasoning-gym",
        ) from None
    paragraphs = re.split(r"\n\s*\n", read_data_file("in_the_year_2889.txt"))
    joined = [" ".join(paragraph.split()) for paragraph in paragraphs]
    return [paragraph for paragraph in joined if len(paragraph.split()) >= 30]


SOURCES = {"scripture": _scripture, "story": _story}


def rows(source: str = "scripture", count: int = 40, words: int = 60, seed: int = 0) -> Iterator[dict[str, str]]:
    """Passages of running prose, each the first `words` words of a different paragraph, in seeded order.

    Yields `{"text": passage}`. Raises `InputError` for an unknown source, fewer than `count` paragraphs, or a package
    that is not installed.
    """
    if source not in SOURCES:
        raise InputError(f"unknown text {source!r}", where="source", fix=did_you_mean(str(source), SOURCES))
    count, words, seed = checked_count(count), checked_count(words, "words"), checked_seed(seed)
    paragraphs = SOURCES[source]()
    if count > len(paragraphs):
        raise InputError(
            f"{source} has {len(paragraphs)} paragraphs, {count} were asked", where="count", fix="ask for fewer rows"
        )
    random.Random(f"{seed}/{source}").shuffle(paragraphs)
    for paragraph in paragraphs[:count]:
        yield {"text": " ".join(paragraph.split()[:words])}
