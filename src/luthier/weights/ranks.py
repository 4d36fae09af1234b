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

from luthier.weights.ahead import ahead

# Each call starts over: the place of the first element, and (K, n) float32, or what computes them on another thread.
Stretch = tuple[int, Tensor | Callable[[], Tensor]]
Walk = Callable[[], Iterable[Stretch]]
_BINS = 1 << 16
EVERY = 2**63 - 1  # a place behind all others


@dataclass(frozen=True)
class Cut:
    """Which numbers are above a rank: those larger than `value`, and of those equal to it the ones before `place`
    (all of them if it is `EVERY`)."""

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

    def keep(self, numbers: Tensor, place: int, out: Tensor) -> None:
        """Write into `out` the numbers whose magnitude is above, and 0 for all others; the cut is one of magnitudes."""
        if self.value == float("-inf"):
            out.copy_(numbers)
        elif place >= self.place and 0 <= self.value < float("inf"):
            torch.hardshrink(numbers, self.value, out=out)
        elif place + numbers.numel() <= self.place and 0 < self.value < float("inf"):
            # as above, but for those that equal the value: a threshold one step lower
            torch.hardshrink(numbers, float(_before(self.value)), out=out)
        else:
            torch.mul(numbers, self.above(numbers.abs(), place), out=out)


def order_statistics(walk: Walk, ranks: Sequence[int], *, magnitudes: bool = False) -> Tensor:
    """The numbers at ascending 0-based `ranks` of each row: (K, len(ranks)) float32, exact.

    Two passes over `walk`. Every rank must be below the number of elements; rows must not hold NaN.

    Args:
        magnitudes: rank by absolute value; the magnitudes are returned.
    """
    return _ranked(walk, lambda total: ranks, magnitudes)[0]


def top_cuts(walk: Walk, counts: Sequence[int], *, magnitudes: bool = False) -> list[list[Cut]]:
    """For each row and each count the `Cut` above which exactly so many numbers stand.

    Of equal numbers the earlier ones are above. A count of 0 gives a cut above everything, one of all elements a cut
    below everything. Two passes over `walk`, and a third where ties must be told apart.

    Args:
        magnitudes: rank by absolute value.
    """

    def ranks(total: int) -> list[int]:
        return [min(max(total - count, 0), total - 1) for count in counts]

    values, above, equal, total = _ranked(walk, ranks, magnitudes)
    rows = len(values)
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
                value, place = float("-inf"), EVERY
            elif ties >= int(equal[row, column]):
                place = EVERY
            else:
                wanted[row, column] = ties
            cuts[row].append(Cut(value, place))
    if wanted:
        sought = {key: (cuts[key[0]][key[1]].value, ties) for key, ties in wanted.items()}
        found = _places(walk, sought, magnitudes)
        for (row, column), place in found.items():
            cuts[row][column] = Cut(cuts[row][column].value, place)
    return cuts


def _before(value: float) -> Tensor:
    """The largest float32 below `value` > 0."""
    return torch.nextafter(torch.tensor(value, dtype=torch.float32), torch.tensor(0.0))


def _keys(numbers: Tensor, magnitudes: bool) -> Tensor:
    """(n,) int32 that order as the float32 (or their magnitudes) do; both zeros have the same."""
    if magnitudes:
        return numbers.reshape(-1).view(torch.int32) & 0x7FFFFFFF
    bits = (numbers.reshape(-1) + 0.0).view(torch.int32)
    return bits.bitwise_xor_(bits.bitwise_right_shift(31).bitwise_and_(0x7FFFFFFF))


def _from_key(key: int) -> float:
    bits = torch.tensor([key], dtype=torch.int32)
    return float(torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)[0])


def _ranked(
    walk: Walk, ranks_of: Callable[[int], Sequence[int]], magnitudes: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Per row and rank: the number there (float32), how many are larger, how many equal it (int64); and elements.

    Args:
        ranks_of: the ascending 0-based ranks, given the number of elements of a row.
    """
    upper = _upper(walk, magnitudes)
    rows, cumulated = len(upper), upper.cumsum(1)
    total = int(cumulated[0, -1])
    ranks = ranks_of(total)
    bins = [[int(torch.searchsorted(row, rank, right=True)) for rank in ranks] for row in cumulated]
    lower = {(row, b): torch.zeros(_BINS, dtype=torch.int64) for row in range(rows) for b in bins[row]}

    def within_bins(item: Stretch) -> list[tuple[int, int, Tensor]]:
        found = []
        for row, values in enumerate(_numbers(item[1])):
            keys = _keys(values, magnitudes)
            high = keys >> 16
            found += [(row, b, keys[high == b - _BINS // 2].bitwise_and_(0xFFFF)) for b in set(bins[row])]
        return found

    for found in ahead(walk(), within_bins):
        for row, b, low in found:
            lower[row, b] += torch.bincount(low, minlength=_BINS) if len(low) else 0
    values = torch.empty(rows, len(ranks))
    above, equal = (torch.empty(rows, len(ranks), dtype=torch.int64) for _ in range(2))
    for row in range(rows):
        for column, rank in enumerate(ranks):
            b = bins[row][column]
            before = int(cumulated[row, b - 1]) if b else 0
            within = lower[row, b].cumsum(0)
            at = int(torch.searchsorted(within, rank - before, right=True))
            values[row, column] = _from_key(((b - _BINS // 2) << 16) | at)
            above[row, column] = total - before - int(within[at])
            equal[row, column] = int(lower[row, b][at])
    return values, above, equal, total


def _upper(walk: Walk, magnitudes: bool) -> Tensor:
    """(rows, bins) int64 counts of the upper halves of the keys, the lowest first."""

    def upper(item: Stretch) -> list[Tensor]:
        found = []
        for values in _numbers(item[1]):
            keys = _keys(values, magnitudes).bitwise_right_shift_(16)
            if not magnitudes:  # of which none is negative
                keys.add_(_BINS // 2)
            found.append(torch.bincount(keys, minlength=_BINS // 2 if magnitudes else _BINS))
        return found

    counts: list[Tensor] = []
    for found in ahead(walk(), upper):
        for row, here in enumerate(found):
            if row == len(counts):
                counts.append(torch.zeros(_BINS, dtype=torch.int64))
            counts[row][_BINS - len(here) :] += here
    if not counts or not int(counts[0].sum()):
        raise ValueError("there are no numbers to rank")
    return torch.stack(counts)


def _places(
    walk: Walk, wanted: dict[tuple[int, int], tuple[float, int]], magnitudes: bool
) -> dict[tuple[int, int], int]:
    """For each key (row, column): the place behind the n-th number of the row that equals the value."""
    left = {key: ties for key, (_, ties) in wanted.items()}
    found: dict[tuple[int, int], int] = {}

    def equals(item: Stretch) -> tuple[int, dict[tuple[int, int], tuple[int, Tensor]]]:
        place, numbers = item[0], _numbers(item[1])
        here = {}
        for key in [k for k in wanted if k not in found]:
            values = numbers[key[0]].reshape(-1)
            equal = (values.abs() if magnitudes else values) == wanted[key][0]
            here[key] = int(equal.sum()), equal
        return place, here

    for place, here in ahead(walk(), equals):
        for key, (count, equal) in here.items():
            if key in found:
                continue
            if count < left[key]:
                left[key] -= count
            else:
                found[key] = place + int(equal.nonzero()[left[key] - 1, 0]) + 1
        if len(found) == len(wanted):
            break
    return found


def _numbers(given: Tensor | Callable[[], Tensor]) -> Tensor:
    return given if isinstance(given, Tensor) else given()
