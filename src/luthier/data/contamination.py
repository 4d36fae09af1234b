"""Contamination: training rows that contain what the model is going to be evaluated on.

A training row is contaminated by an evaluation text if it has at least seven tenths of the text's distinctive 13-grams
(windows of 13 words). 13 words is the measure of Brown and others (2020, "Language models are few-shot learners",
appendix C); as there, windows that more than ten training rows share are no sign of anything (system prompts,
instructions, licence texts) and do not count, nor do those of more than ten evaluation texts. They call a row
contaminated for one common window, which takes out every row that quotes the same proverb; the share of seven tenths
is that of Chowdhery and others (2022, PaLM), who ask how much of a text was seen.

    text of 13 words or more   its 13-grams; of a long text the 32 with the smallest hashes stand for all
    8 to 12 words              the whole text is one window, looked for anywhere in a training row
    fewer                      only a training row, or the prompt of one, that says just this is contaminated

Two passes over the training rows: `Evaluation.count` sees them all, then `Evaluation.contaminates` decides on those
that share anything. Memory: about 400 bytes for an evaluation text, nothing for a training row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.clean import content_key, mixed, ngrams, prompt_text, row_text, word_hashes

WINDOW, SHORTEST = 13, 8
KEPT = 32  # windows that stand for a text
COMMON = 10  # a window in more rows, or more texts, than this is boilerplate
SHARE = 0.7


class Evaluation:
    """The windows of all evaluation texts, ready to be looked for in training rows."""

    def __init__(self, texts: Iterable[str]):
        windows: list[NDArray[np.uint64]] = []
        self.sizes: set[int] = set()
        self.short: set[int] = set()
        self.texts = 0
        for text in texts:
            words = word_hashes(text)
            if len(words) >= SHORTEST:
                size = min(WINDOW, len(words))
                self.sizes.add(size)
                windows.append(np.unique(_tagged(ngrams(words, size), size))[:KEPT])
            elif len(words):
                self.short.add(content_key(text))
            self.texts += 1
        of_text = np.repeat(np.arange(len(windows), dtype=np.int64), [len(part) for part in windows])
        together = np.concatenate([np.zeros(0, dtype=np.uint64), *windows])
        order = np.argsort(together, kind="stable")
        self._window, self._begins, self._texts_with = np.unique(together[order], return_index=True, return_counts=True)
        self._text = of_text[order]
        self._rows_with = np.zeros(len(self._window), dtype=np.int64)
        self._common: NDArray[np.bool_] | None = None
        self._distinctive = np.zeros(0, dtype=np.int64)  # windows of each text that are not common

    def count(self, row: Mapping[str, Any]) -> bool:
        """Note which windows a training row has; whether it has any, so that it must be looked at again."""
        hits = self._hits(row)
        self._rows_with[hits] += 1
        return bool(len(hits)) or self._says_just_a_short_text(row)

    def contaminates(self, row: Mapping[str, Any]) -> bool:
        """Whether an evaluation text is in `row`. Call `count` on all training rows first."""
        if self._common is None:
            self._common = (self._rows_with > COMMON) | (self._texts_with > COMMON)
            self._distinctive = np.bincount(self._text[np.repeat(~self._common, self._texts_with)])
        hits = self._hits(row)
        hits = hits[~self._common[hits]]
        if len(hits):
            found = [self._text[self._begins[hit] : self._begins[hit] + self._texts_with[hit]] for hit in hits]
            texts, counts = np.unique(np.concatenate(found), return_counts=True)
            if (counts >= SHARE * self._distinctive[texts]).any():
                return True
        return self._says_just_a_short_text(row)

    def _hits(self, row: Mapping[str, Any]) -> NDArray[np.int64]:
        """Indices of the windows that the row has, each once."""
        if not len(self._window):
            return np.zeros(0, dtype=np.int64)
        words = word_hashes(row_text(row, system=False))
        seen = [np.zeros(0, dtype=np.uint64)] + [_tagged(ngrams(words, size), size) for size in sorted(self.sizes)]
        there = np.unique(np.concatenate(seen))
        places = np.minimum(np.searchsorted(self._window, there), len(self._window) - 1)
        return places[self._window[places] == there]

    def _says_just_a_short_text(self, row: Mapping[str, Any]) -> bool:
        if not self.short:
            return False
        return not self.short.isdisjoint((content_key(row_text(row, system=False)), content_key(prompt_text(row))))


def _tagged(windows: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """Windows of different sizes as different numbers."""
    return mixed(windows, seed=size)
