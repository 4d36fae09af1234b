"""Pairs of a better and a worse answer, seen through the encoded examples of a split.

A preference row is encoded as two examples that stand together, chosen first. `PairedExamples` gives them out as pairs
and says how long a pair is, so that plans of epochs and micro-batches are made over pairs. A pair whose two answers
are the same tells nothing: it is left out and counted.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from luthier.data.encode import Encoded
from luthier.errors import InputError


class PairedExamples:
    """The pairs of `encodings` (`luthier.data.store.Encodings`, or anything with `row` and its indexing).

    Attributes:
        lengths: (pairs,) int64, tokens that a pair takes in a padded batch: twice its longer side.
        tokens: (pairs,) int64, tokens of both sides without padding.
        identical: pairs that were left out because both answers are the same.
        reference: (pairs, 2) float64 summed log-probabilities of chosen and rejected under a reference model, if they
            were computed beforehand (`luthier.train.reference`); else None.

    Raises `InputError` if a row is not a pair.
    """

    def __init__(self, encodings: Any):
        rows = np.asarray(encodings.row)
        firsts = np.flatnonzero(np.diff(rows, prepend=-1)) if len(rows) else np.zeros(0, dtype=np.int64)
        sizes = np.diff(np.append(firsts, len(rows)))
        if (sizes != 2).any():
            bad = int(rows[firsts[np.flatnonzero(sizes != 2)[0]]])
            raise InputError(
                f"row {bad + 1} of the data is no pair of a chosen and a rejected answer",
                where="objective",
                fix="give rows with prompt, chosen and rejected, or use objective: sft",
            )
        self._examples = encodings
        distinct = [first for first in firsts if encodings[int(first)] != encodings[int(first) + 1]]
        self._firsts = np.asarray(distinct, dtype=np.int64)
        self.identical = len(firsts) - len(distinct)
        long = np.asarray(encodings.lengths, dtype=np.int64)
        chosen, rejected = long[self._firsts], long[self._firsts + 1]
        self.lengths, self.tokens = 2 * np.maximum(chosen, rejected), chosen + rejected
        self.reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._firsts)

    def __getitem__(self, index: int) -> tuple[Encoded, Encoded]:
        first = int(self._firsts[index])
        return self._examples[first], self._examples[first + 1]

    def fingerprint(self) -> str:
        """A hash of every token and label, and so of rows, template, loss mask and length limit together."""
        whole = hashlib.sha256()
        for index in range(len(self)):
            for side in self[index]:
                for column in (side["input_ids"], side["labels"]):
                    whole.update(np.asarray([len(column), *column], dtype=np.int64).tobytes())
        return whole.hexdigest()
