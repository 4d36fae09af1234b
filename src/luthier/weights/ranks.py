"""Exact ranks of numbers that are never all in memory: order statistics and rank cuts over a stream of tiles.

A merge keeps, say, the fifth of all weights that moved most. Sorting them would need the whole vector in memory, and
several times over. Instead each number is seen as an integer that orders as it does (the bits of a float32, with those
of negative numbers turned over), and counted twice:

    first pass     how many numbers fall into each of 65,536 bins of the upper 16 bits; the rank's bin follows
    second pass    how many of those in that bin fall into each of 65,536 bins of the lower 16 bits: the very number

Memory is two tables of 512 KiB per row, whatever the number of elements. `-0.0` and `0.0` are one value here.

Equal numbers are told apart by their place, counted through the stream: the lower place ranks first. That makes counts
exact and stable. Differences of 16-bit weights lie on a coarse grid, so ties at the threshold are the rule there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Walk = Callable[[], Iterable[tuple[int, Tensor]]]  # each call starts over: (place of the first element, (K, n) float32)
_BINS = 1 << 16


@dataclass(frozen=True)
class Cut:
    """Which numbers are above a rank: those larger than `value`, and of those equal to it the ones before `place`."""

    value: float
    place: int

    def above(self, numbers: Tensor, place: int) -> Tensor:
        """(n,) or any shape of float32 in C order whose first element stands at `place` -> bool of that shape."""
        if place >= self.place:
            return numbers > self.value
        if place + numbers.numel() <= self.place:
            return numbers >= self.value
        first = torch.arange(numbers.numel(), device=numbers.device).view(numbers.shape) < self.place - place
        return (numbers > self.value) | ((numbers == self.value) & first)


def order_statistics(walk: Walk, ranks: Sequence[int]) -> Tensor:
    """The numbers at ascending 0-based `ranks` of each row: (K, len(ranks)) float32, exact.

    Two passes over `walk`. Every rank must be below the number of elements; rows must not hold NaN.
    """
    rows, counts = _upper(walk)
    cumulated = counts.cumsum(1)
    bins = torch.stack([torch.searchsorted(cumulated, torch.full((rows, 1), r), right=True)[:, 0] for r in ranks], 1)
    return _lower(walk, cumulated, bins, ranks)


def top_cuts(walk: Walk, counts: Sequence[int]) -> list[list[Cut]]:
    """For each row and each count the `Cut` above which exactly so many numbers stand.

    Of equal numbers the earlier ones are above. A count of 0 gives a cut above everything, one of all elements a cut
    below everything. Two passes over `walk`, and a third where ties must be told apart.
    """
    rows, upper = _upper(walk)
    total = int(upper[0].sum())
    ranks = [min(max(total - count, 0), total - 1) for count in counts]
    cumulated = upper.cumsum(1)
    bins = torch.stack([torch.searchsorted(cumulated, torch.full((rows, 1), r), right=True)[:, 0] for r in ranks], 1)
    values, above, equal = _lower_counts(walk, cumulated, bins, ranks, total)
    cuts: list[list[Cut]] = []
    wanted: dict[tuple[int, int], int] = {}
    for row in range(rows):
        cuts.append([])
        for column, count in enumerate(counts):
            value, ties = float(values[row, column]), count - int(above[row, column])
            place = 0
            if count <= 0:
                value = float("inf")
            elif count >= total:
                value = float("-inf")
            elif ties >= int(equal[row, column]):
                place = 2**63 - 1  # every number that equals it, wherever: a walk may leave places out
            else:
                wanted[row, column] = ties
            cuts[row].append(Cut(value, place))
    if wanted:
        found = _places(walk, {key: (cuts[key[0]][key[1]].value, ties) for key, ties in wanted.items()})
        for (row, column), place in found.items():
            cuts[row][column] = Cut(cuts[row][column].value, place)
    return cuts


def _keys(numbers: Tensor) -> Tensor:
    """int32 that order as the float32 do; of both zeros the positive one."""
    bits = (numbers + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _from_keys(keys: Tensor) -> Tensor:
    keys = keys.to(torch.int32)
    return torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys).view(torch.float32)


def _upper(walk: Walk) -> tuple[int, Tensor]:
    """Number of rows, and (rows, bins) int64 counts of the upper halves of the keys."""
    counts: list[Tensor] = []
    for _, numbers in walk():
        for row, values in enumerate(numbers):
            if row == len(counts):
                counts.append(torch.zeros(_BINS, dtype=torch.int64))
            upper = (_keys(values) >> 16) + _BINS // 2
            counts[row] += torch.bincount(upper.view(-1), minlength=_BINS)
    if not counts or not int(counts[0].sum()):
        raise ValueError("there are no numbers to rank")
    return len(counts), torch.stack(counts)


def _lower_counts(
    walk: Walk, cumulated: Tensor, bins: Tensor, ranks: Sequence[int], total: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row and rank: the number there, how many are larger, how many equal it."""
    rows = len(bins)
    counts = {(row, int(b)): torch.zeros(_BINS, dtype=torch.int64) for row in range(rows) for b in bins[row]}
    for _, numbers in walk():
        for row, values in enumerate(numbers):
            keys = _keys(values).view(-1)
            upper = (keys >> 16) + _BINS // 2
            for b in {int(b) for b in bins[row]}:
                chosen = keys[upper == b]
                if len(chosen):
                    counts[row, b] += torch.bincount(chosen & 0xFFFF, minlength=_BINS)
    values = torch.empty(rows, len(ranks))
    above = torch.empty(rows, len(ranks), dtype=torch.int64)
    equal = torch.empty(rows, len(ranks), dtype=torch.int64)
    for row in range(rows):
        for column, rank in enumerate(ranks):
            b = int(bins[row, column])
            before = int(cumulated[row, b - 1]) if b else 0
            lower = counts[row, b].cumsum(0)
            found = int(torch.searchsorted(lower, torch.tensor([rank - before]), right=True)[0])
            values[row, column] = _from_keys(torch.tensor([((b - _BINS // 2) << 16) | found]))[0]
            above[row, column] = total - before - int(lower[found])
            equal[row, column] = int(counts[row, b][found])
    return values, above, equal


def _lower(walk: Walk, cumulated: Tensor, bins: Tensor, ranks: Sequence[int]) -> Tensor:
    return _lower_counts(walk, cumulated, bins, ranks, int(cumulated[0, -1]))[0]


def _places(walk: Walk, wanted: dict[tuple[int, int], tuple[float, int]]) -> dict[tuple[int, int], int]:
    """For each key (row, column): the place behind the n-th number of the row that equals the value."""
    left = {key: ties for key, (_, ties) in wanted.items()}
    found: dict[tuple[int, int], int] = {}
    for place, numbers in walk():
        for key in [k for k in wanted if k not in found]:
            equal = numbers[key[0]].reshape(-1) == wanted[key][0]
            here = int(equal.sum())
            if here < left[key]:
                left[key] -= here
                continue
            where = equal.nonzero()[left[key] - 1, 0]
            found[key] = place + int(where) + 1
        if len(found) == len(wanted):
            break
    return found
