"""Near duplicates: rows that share most of their words in the same order, found without comparing all pairs.

A row is the set of its windows of five words (shingles). Two rows are near if the Jaccard index of their sets,
|A and B| / |A or B|, is about 0.8 or more. MinHash (Broder, 1997, "On the resemblance and containment of documents")
estimates it: under a random hash function the smallest values of two sets agree with just that probability, so the
share of 128 functions that agree has a standard error of 0.035 at 0.8. Locality-sensitive hashing (Indyk and Motwani,
1998) finds the candidates: the 128 values are cut into 16 bands of 8; rows that agree in a whole band are compared.
A pair at 0.8 meets in some band with probability 1 - (1 - 0.8^8)^16 = 0.95, at 0.9 with 0.9999, at 0.5 with 0.06.

    sketch     one row: 128 numbers (512 bytes), on disk while a data set is prepared
    clusters   all rows: which of them hang together; memory for one band at a time (about 30 bytes a row)

Hash functions are the linear maps a x + b mod 2^32 with fixed odd a, on shingles that are scattered already: the same
text has the same sketch in every run. Rows of fewer than five words are one shingle: near only if the words are equal.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from luthier.data.clean import mixed, ngrams

SHINGLE = 5
BANDS, BAND = 16, 8
FUNCTIONS = BANDS * BAND
THRESHOLD = 0.8

_MULTIPLIERS = (mixed(np.arange(FUNCTIONS, dtype=np.uint64), seed=1) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
_OFFSETS = (mixed(np.arange(FUNCTIONS, dtype=np.uint64), seed=2) >> np.uint64(32)).astype(np.uint32)
_WEIGHTS = mixed(np.arange(BAND, dtype=np.uint64), seed=3) | np.uint64(1)
_BLOCK = 512  # shingles hashed at a time, and rows compared at a time: what fits into a processor's cache


def sketch(words: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """(128,) the smallest hash of the row's shingles under each function; all ones for a row without words.

    Args:
        words: (words,) as `clean.word_hashes` gives them.
    """
    shingles = ngrams(words, min(SHINGLE, max(1, len(words)))).astype(np.uint32)
    smallest = np.full(FUNCTIONS, 2**32 - 1, dtype=np.uint32)
    with np.errstate(over="ignore"):
        for start in range(0, len(shingles), _BLOCK):
            block = shingles[start : start + _BLOCK, None] * _MULTIPLIERS + _OFFSETS
            np.minimum(smallest, block.min(axis=0), out=smallest)
    return smallest


def resemblance(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The estimated Jaccard index (0 to 1) of sketches (..., 128), row by row."""
    return (one == other).mean(axis=-1)


def clusters(sketches: NDArray[np.uint32], *, threshold: float = THRESHOLD) -> NDArray[np.int64]:
    """(rows,) for each row the smallest index among the rows that it hangs together with; its own if it stands alone.

    Args:
        sketches: (rows, 128), in memory or memory-mapped.
        threshold: estimated Jaccard index from which two candidates count as near.

    Rows hang together through chains: a near b and b near c put a and c into one cluster. In a bucket of a band, each
    row is compared with the first and with the one before it, not with all; sixteen bands make up for it.
    """
    parents = np.arange(len(sketches), dtype=np.int64)
    spoken = _has_words(sketches)
    for band in range(BANDS):
        keys = _band_keys(sketches, band)
        order = np.argsort(keys, kind="stable")
        order = order[spoken[order]]
        begins = np.flatnonzero(np.diff(keys[order], prepend=keys[order][:1] + np.uint64(1)))
        first = np.repeat(order[begins], np.diff(begins, append=len(order))) if len(order) else order
        for partner in (first, np.roll(order, 1)):
            same = (keys[partner] == keys[order]) & (partner != order)
            for start in range(0, int(same.sum()), _BLOCK):
                left, right = partner[same][start : start + _BLOCK], order[same][start : start + _BLOCK]
                near = parents[left] != parents[right]
                left, right = left[near], right[near]
                near = resemblance(sketches[left], sketches[right]) >= threshold
                for a, b in zip(left[near].tolist(), right[near].tolist(), strict=True):
                    _join(parents, a, b)
    while not np.array_equal(parents, higher := parents[parents]):
        parents = higher
    return parents


def _has_words(sketches: NDArray[np.uint32]) -> NDArray[np.bool_]:
    return np.asarray(sketches[:, 0] != 2**32 - 1) | np.asarray(sketches[:, 1] != 2**32 - 1)


def _band_keys(sketches: NDArray[np.uint32], band: int) -> NDArray[np.uint64]:
    keys = np.empty(len(sketches), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for start in range(0, len(sketches), _BLOCK):
            block = sketches[start : start + _BLOCK, band * BAND : (band + 1) * BAND].astype(np.uint64)
            keys[start : start + _BLOCK] = (mixed(block) * _WEIGHTS).sum(axis=1, dtype=np.uint64)
    return keys


def _find(parents: NDArray[np.int64], row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = int(parents[row])
    return row


def _join(parents: NDArray[np.int64], one: int, other: int) -> None:
    a, b = _find(parents, one), _find(parents, other)
    if a != b:
        parents[max(a, b)] = min(a, b)
