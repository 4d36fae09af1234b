"""Who is training, validation and test: by a seeded hash, so the order of the file does not matter.

Rows that must stay together form a unit: rows of one group, or copies of one text. Units are put in the order of a
seeded hash of what they are (never of where they stand) and cut from the front: first the test rows, then validation,
the rest is training. With labels, each class is cut by itself; what rounding leaves over is carried to the next class,
so that the totals are exact and every class is within one row of its share. A unit larger than what is wanted is
passed over, so one huge group does not make a huge test split, and does not draw all other groups into it either; if
all are too large, the smallest is taken.

Adding rows to a file moves few of the others, since each keeps its place in the order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from luthier.data.clean import mixed
from luthier.errors import InputError

TRAIN, VALIDATION, TEST = 0, 1, 2
SPLITS = ("train", "validation", "test")


def assign(
    units: NDArray[np.uint64],
    shares: tuple[float, float, float],
    *,
    seed: int,
    labels: NDArray[np.uint64] | None = None,
) -> NDArray[np.int8]:
    """(rows,) 0, 1 or 2 for training, validation, test.

    Args:
        units: (rows,) the same number for rows that must stay together.
        shares: of training, validation and test rows; they sum to 1. A share above 0 gets at least one row.
        seed: another seed gives another split.
        labels: (rows,) the same number for rows of one class, or None; a unit of several classes counts as its most
            frequent one.

    Raises `InputError` if there are fewer units than splits with a share, or no unit is left for training.
    """
    rows = len(units)
    unique, inverse, sizes = np.unique(units, return_inverse=True, return_counts=True)
    wanted_splits = [split for split in (TEST, VALIDATION) if shares[split] > 0]
    if len(unique) <= len(wanted_splits):
        what = f"{rows} rows in {len(unique)} groups or different texts cannot be split into {len(wanted_splits) + 1}"
        raise InputError(what, where="data.split", fix="give more rows, or validation and test files of their own")
    classes = np.zeros(len(unique), dtype=np.uint64) if labels is None else _majority(inverse, labels, len(unique))
    order = np.lexsort((mixed(unique, seed), mixed(classes, seed)))
    made = np.full(len(unique), TRAIN, dtype=np.int8)
    exact = {split: amount / rows for split, amount in _amounts(sizes, shares, wanted_splits).items()}
    wanted = dict.fromkeys(wanted_splits, 0.0)
    for stratum in np.split(order, np.flatnonzero(np.diff(classes[order])) + 1):
        count = int(sizes[stratum].sum())
        for split in wanted_splits:
            wanted[split] += exact[split] * count
            wanted[split] -= _take(stratum, sizes, made, split, wanted[split])
    for split in wanted_splits:
        if not (made == split).any():  # every unit was too large
            left = order[made[order] == TRAIN]
            made[left[np.argmin(sizes[left])]] = split
    if not (made == TRAIN).any():
        raise InputError("no row is left for training", where="data.split", fix="give more rows or smaller shares")
    return made[inverse]


def _amounts(sizes: NDArray[np.int64], shares: tuple[float, float, float], wanted: list[int]) -> dict[int, int]:
    """How many rows each held-out split shall have: its share, or less where too large units hold many of the rows."""
    rows, held_out = int(sizes.sum()), sum(shares[split] for split in wanted)
    amounts = {}
    for split in wanted:
        amount = shares[split] * rows
        small = int(sizes[sizes <= 2 * max(amount, 1)].sum())
        if small < rows:  # held-out splits together get at most half of the rows that can be held out at all
            amount = min(amount, shares[split] / held_out * small / 2)
        amounts[split] = max(round(amount), 1)
    return amounts


def _take(
    stratum: NDArray[np.int64], sizes: NDArray[np.int64], made: NDArray[np.int8], split: int, wanted: float
) -> int:
    """Give units of `stratum` to `split` while that brings it nearer to `wanted` rows; how many rows it got."""
    taken = 0
    for unit in stratum:
        if wanted - taken < 0.5 - 1e-9:
            break
        if made[unit] == TRAIN and sizes[unit] <= 2 * (wanted - taken) + 1e-9:
            made[unit] = split
            taken += int(sizes[unit])
    return taken


def _majority(inverse: NDArray[np.int64], labels: NDArray[np.uint64], units: int) -> NDArray[np.uint64]:
    """(units,) the most frequent label of each unit, the smallest of several."""
    names, codes = np.unique(labels, return_inverse=True)
    pairs, counts = np.unique(inverse.astype(np.int64) * len(names) + codes, return_counts=True)
    unit, code = pairs // len(names), pairs % len(names)
    best = np.lexsort((-code, counts, unit))  # the last of each unit is its most frequent, smallest label
    majority = np.empty(units, dtype=np.uint64)
    majority[unit[best]] = names[code[best]]
    return majority
