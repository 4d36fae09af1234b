"""Exact order statistics by counting alone: two passes, two tables of 512 KiB per row, whatever the numbers are.

Each number is seen as an integer that orders as it does (the bits of a float32, with those of negative numbers turned
over), and counted twice:

    first pass     how many numbers fall into each of 65,536 bins of the upper 16 bits; the rank's bin follows
    second pass    how many of those in that bin fall into each of 65,536 bins of the lower 16 bits: the very number

It needs nothing of the numbers, but counting into bins is many times slower than comparing; `brackets` compares, and
comes here where its guess was wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from luthier.later import torch
from luthier.weights.ahead import ahead

if TYPE_CHECKING:
    from torch import Tensor

Stretch: TypeAlias = "tuple[int, Tensor | Callable[[], Tensor]]"  # where it stands; `Differences` are such a callable
Walk = Callable[[], Iterable[Stretch]]
_BINS = 1 << 16


def counted(walk: Walk, ranks: Sequence[int], magnitudes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Per row and ascending 0-based rank: the number there (float32), how many are larger, how many equal (int64)."""
    upper = _upper(walk, magnitudes)
    rows, cumulated = len(upper), upper.cumsum(1)
    total = int(cumulated[0, -1])
    bins = [[int(torch.searchsorted(row, rank, right=True)) for rank in ranks] for row in cumulated]
    lower = {(row, b): torch.zeros(_BINS, dtype=torch.int64) for row in range(rows) for b in bins[row]}

    def within_bins(item: Stretch) -> list[tuple[int, int, Tensor]]:
        found = []
        for row, values in enumerate(numbers_of(item[1])):
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
    return values, above, equal


def numbers_of(given: Tensor | Callable[[], Tensor]) -> Tensor:
    """The (K, n) numbers of a stretch, computed if they are not there yet."""
    return given if isinstance(given, torch.Tensor) else given()


def _keys(numbers: Tensor, magnitudes: bool) -> Tensor:
    """(n,) int32 that order as the float32 (or their magnitudes) do; both zeros have the same."""
    if magnitudes:
        return numbers.reshape(-1).view(torch.int32) & 0x7FFFFFFF
    bits = (numbers.reshape(-1) + 0.0).view(torch.int32)
    return bits.bitwise_xor_(bits.bitwise_right_shift(31).bitwise_and_(0x7FFFFFFF))


def _from_key(key: int) -> float:
    bits = torch.tensor([key], dtype=torch.int32)
    return float(torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)[0])


def _upper(walk: Walk, magnitudes: bool) -> Tensor:
    """(rows, bins) int64 counts of the upper halves of the keys, the lowest first."""

    def upper(item: Stretch) -> list[Tensor]:
        found = []
        for values in numbers_of(item[1]):
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
