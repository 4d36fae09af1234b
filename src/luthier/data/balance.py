"""How often each training row is used: weights of sources, and classes evened out.

    multiplicity of a row  =  weight of its source  *  rows wanted of its class / rows its class has

counted after the weights. `balance` says what is wanted of class c, with n_c rows of N in all:

    none           n_c
    oversample     the largest n_c            (rare rows repeat)
    undersample    the smallest n_c           (frequent rows are left out)
    temperature    N * n_c^(1/T) / sum of n^(1/T)     T = 1 changes nothing, a large T evens all out

A multiplicity of 2.3 means that every row is used twice and three tenths of the rows, those with the smallest seeded
hash, once more: class counts come out to the row, whatever the order of the file.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from luthier.data.clean import mixed


def copies(
    ids: NDArray[np.uint64],
    classes: NDArray[np.int64],
    weights: NDArray[np.float64],
    *,
    balance: str = "none",
    temperature: float = 2.0,
    seed: int = 0,
) -> NDArray[np.int64]:
    """(rows,) how often each training row is written.

    Args:
        ids: (rows,) numbers that tell rows apart by content.
        classes: (rows,) class of each row, any whole numbers.
        weights: (rows,) above 0, the weight of the row's source.
        balance, temperature: as above.
        seed: decides which rows get the fractional copy.
    """
    if not len(ids):
        return np.zeros(0, dtype=np.int64)
    names, codes = np.unique(classes, return_inverse=True)
    counts = np.bincount(codes, weights=weights, minlength=len(names)).astype(np.float64)
    factors: NDArray[np.float64] = _wanted(counts, balance, temperature) / counts
    multiplicity = weights * factors[codes]
    made = np.floor(multiplicity + 1e-9).astype(np.int64)
    rest = np.maximum(multiplicity - made, 0.0)
    sources, source_codes = np.unique(weights, return_inverse=True)
    cells = codes * len(sources) + source_codes  # within a cell every row has the same multiplicity
    order = np.lexsort((mixed(ids, seed), cells))
    begins = np.flatnonzero(np.diff(cells[order], prepend=-1))
    for begin, end in zip(begins, np.append(begins[1:], len(order)), strict=True):
        extra = round(float(rest[order[begin]]) * (end - begin))
        made[order[begin : begin + extra]] += 1
    return made


def _wanted(counts: NDArray[np.float64], balance: str, temperature: float) -> NDArray[np.float64]:
    if balance == "oversample":
        return np.full_like(counts, counts.max())
    if balance == "undersample":
        return np.full_like(counts, counts.min())
    if balance == "temperature":
        shares = counts ** (1.0 / temperature)
        return counts.sum() * shares / shares.sum()
    return counts
