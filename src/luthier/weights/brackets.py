"""Exact order statistics by guessing and comparing: a sample says where a rank lies, one pass makes it exact.

    first pass     a sample of every s-th number; if s is 1 it is all of them, and the answer
    second pass    count what is below, at and above two values that bracket the rank, and keep the few between them

The sample is of some hundred thousand numbers; the bracket is six standard deviations of the rank's error to either
side, so what lies between is about a hundredth of all, and no more is kept than `KEPT`. Numbers on a coarse grid, as
differences of 16-bit weights are, mostly equal one of the two values; they are only counted. Where a guess was wrong
(numbers that repeat in step with the sample), or too much lies between (more than a thousand million numbers), the row
is counted into bins instead: see `counting`. So the answer is always exact. Comparing and counting are numpy's, which
does both many times faster than torch does; of `Differences` a sample reads only what it takes, and a compiled pass
compares and counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from luthier.weights.ahead import ahead
from luthier.weights.counting import Stretch, Walk, counted, numbers_of
from luthier.weights.stored import Differences

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 2**18  # numbers of each row that a sample holds at most
LEAST = 2**14  # and at least, where a row's length is known and the sample is of a 32nd
KEPT = 3 * 2**22  # numbers of each row and rank that may lie in a bracket
WIDE = 6.0  # standard deviations
Numbers = NDArray[np.float32]


@dataclass
class Place:
    """A rank of one row: the number there, how many are larger, how many equal it, and where those stand.

    Attributes:
        at: the place behind the n-th (from 1) of the numbers that equal it, in the order of the stream.
    """

    value: float
    above: int
    equal: int
    at: Callable[[int], int]


@dataclass
class Bracket:
    """A rank of one row between two values."""

    row: int
    rank: int
    low: float
    high: float
    above_low: int = 0  # numbers > low
    above_high: int = 0
    equals: list[tuple[int, int, int]] = field(default_factory=list)  # (place, equal to low, equal to high) by stretch
    inside: list[Numbers] = field(default_factory=list)
    kept: int = 0


def ranked(
    walk: Walk, ranks_of: Callable[[int], Sequence[int]], magnitudes: bool, expected: int = 0
) -> tuple[list[list[Place]], int]:
    """For each row and each 0-based rank its `Place`; and how many numbers a row has.

    Args:
        ranks_of: the ascending ranks, given that number.
        expected: that number, if it is known before: the sample is then taken in the right steps from the start.
    """
    samples, stride, total = _sampled(walk, magnitudes, expected)
    ranks = list(ranks_of(total))
    if stride == 1:
        return [_in_memory(values, start, ranks) for values, start in samples], total
    brackets = [bracket for row, (values, _) in enumerate(samples) for bracket in _guess(row, ranks, total, values)]
    del samples
    _compare(walk, brackets, magnitudes)
    found = [_resolved(walk, bracket, total, magnitudes) for bracket in brackets]
    if any(place is None for place in found):
        values, above, equal = counted(walk, ranks, magnitudes)
        for number, bracket in enumerate(brackets):
            key = bracket.row, number % len(ranks)
            value = float(values[key])
            if found[number] is None:
                found[number] = Place(
                    value, int(above[key]), int(equal[key]), _searcher(walk, bracket.row, value, magnitudes)
                )
    whole = [place for place in found if place is not None]
    return [whole[at : at + len(ranks)] for at in range(0, len(whole), len(ranks))], total


def _numbers(row: Tensor, magnitudes: bool) -> Numbers:
    """A row as numpy has it; magnitudes if they are wanted, and both zeros one."""
    values = row.detach().reshape(-1).numpy()
    return np.abs(values) if magnitudes else values + np.float32(0)


def _sampled(walk: Walk, magnitudes: bool, expected: int) -> tuple[list[tuple[Numbers, int]], int, int]:
    """Of each row the numbers at places divisible by the stride, and the first place; the stride; numbers of a row."""
    stride, total, first, filled = 1, 0, 0, 0
    while expected > stride * min(SAMPLE, max(LEAST, expected // 32)):
        stride *= 2
    kept: list[Numbers] = []  # of fixed size: many small arrays would lie scattered between the tiles in memory

    def sample(item: Stretch) -> tuple[int, int, int, list[Numbers]]:
        step, (place, given) = stride, item
        start = -place % step
        if magnitudes and isinstance(given, Differences):
            return step, place + start, given.elements, given.every(start, step)
        rows = numbers_of(given)
        return (
            step,
            place + start,
            rows[0].numel(),
            [_numbers(row.reshape(-1)[start::step], magnitudes) for row in rows],
        )

    for step, place, size, rows in ahead(walk(), sample):
        if not total:
            first, kept = place, [np.empty(SAMPLE, np.float32) for _ in rows]
        total += size
        start = -place % stride // step  # the stride may have grown since
        taken, at = [values[start :: stride // step] for values in rows], place + start * step
        while filled + len(taken[0]) > SAMPLE:
            stride *= 2
            odd = first // (stride // 2) % 2  # whether the first one kept is not divisible by the new stride
            half = len(range(odd, filled, 2))
            for values in kept:
                values[:half] = values[odd:filled:2].copy()
            filled, first = half, first + -first % stride
            odd = at // (stride // 2) % 2
            taken, at = [values[odd::2] for values in taken], at + -at % stride
        for values, new in zip(kept, taken, strict=True):
            values[filled : filled + len(new)] = new
        filled += len(taken[0])
    if not total:
        raise ValueError("there are no numbers to rank")
    return [(values[:filled], first) for values in kept], stride, total


def _in_memory(values: Numbers, start: int, ranks: Sequence[int]) -> list[Place]:
    found = []
    ordered = np.partition(values, sorted(set(ranks)))
    for rank in ranks:
        value = ordered[rank]

        def at(count: int, value: np.float32 = value) -> int:
            return start + int(np.flatnonzero(values == value)[count - 1]) + 1

        found.append(Place(float(value), _count(values > value), _count(values == value), at))
    return found


def _guess(row: int, ranks: Sequence[int], total: int, sample: Numbers) -> list[Bracket]:
    size, spans = len(sample), []
    for rank in ranks:
        share = (rank + 0.5) / total
        margin = WIDE * math.sqrt(share * (1 - share) * size) + 4
        spans.append((math.floor(share * size - margin), math.ceil(share * size + margin)))
    wanted = [at for span in spans for at in span if 0 <= at < size]
    ordered = np.partition(sample, wanted) if wanted else sample
    return [
        Bracket(
            row,
            rank,
            float(ordered[below]) if below >= 0 else -math.inf,
            float(ordered[above]) if above < size else math.inf,
        )
        for rank, (below, above) in zip(ranks, spans, strict=True)
    ]


def _compare(walk: Walk, brackets: Sequence[Bracket], magnitudes: bool) -> None:
    """Count and keep: one pass."""

    columns = sum(bracket.row == 0 for bracket in brackets)
    lows, highs = (
        np.array([side(bracket) for bracket in brackets], np.float32).reshape(-1, columns)
        for side in (lambda bracket: bracket.low, lambda bracket: bracket.high)
    )

    def compared(item: Stretch) -> tuple[int, list[tuple[int, int, int, int, Numbers]]]:
        place, given = item
        if magnitudes and isinstance(given, Differences):
            counts = given.compared(lows, highs)
            return place, [
                _of_counts(given, bracket, row)
                for bracket, row in zip(brackets, counts.reshape(-1, 4).tolist(), strict=True)
            ]
        rows = numbers_of(given)
        numbers = {row: _numbers(rows[row], magnitudes) for row in {bracket.row for bracket in brackets}}
        found = []
        for bracket in brackets:
            values, low, high = numbers[bracket.row], np.float32(bracket.low), np.float32(bracket.high)
            over = values > low
            above_low, at_low = _count(over), _count(values >= low)
            above_high, at_high = _count(values > high), 0
            inside = values[:0]
            if high > low:
                within = values < high
                at_high = len(values) - _count(within) - above_high
                within &= over
                inside = values[within] if bracket.kept <= KEPT else inside
            found.append((above_low, at_low - above_low, above_high, at_high, inside))
        return place, found

    for place, found in ahead(walk(), compared):
        for bracket, (above_low, equal_low, above_high, equal_high, inside) in zip(brackets, found, strict=True):
            bracket.above_low += above_low
            bracket.above_high += above_high
            bracket.equals.append((place, equal_low, equal_high))
            bracket.kept += len(inside)
            if bracket.kept > KEPT:
                bracket.inside.clear()
            else:
                bracket.inside.append(inside)


def _of_counts(given: Differences, bracket: Bracket, counts: list[int]) -> tuple[int, int, int, int, Numbers]:
    """What `_compare` notes of a stretch, from how many are above and not below the bracket's two values."""
    above_low, from_low, above_high, from_high = counts
    low, high = np.float32(bracket.low), np.float32(bracket.high)
    between = above_low - from_high if high > low else 0
    wanted = between if bracket.kept <= KEPT else 0
    inside = given.within(bracket.row, low, high, wanted) if wanted else np.empty(0, np.float32)
    return above_low, from_low - above_low, above_high, from_high - above_high if high > low else 0, inside


def _resolved(walk: Walk, bracket: Bracket, total: int, magnitudes: bool) -> Place | None:
    """The place of a bracket's rank; None if the rank is not in the bracket, or too much is."""
    if bracket.kept > KEPT:
        return None
    equal_low = sum(low for _, low, _ in bracket.equals)
    equal_high = sum(high for _, _, high in bracket.equals)
    left = bracket.rank - (total - bracket.above_low - equal_low)
    if left < 0 or bracket.rank >= total - bracket.above_high:
        return None
    if left < equal_low:
        counts = [low for _, low, _ in bracket.equals]
        return Place(bracket.low, bracket.above_low, equal_low, _finder(walk, bracket, bracket.low, counts, magnitudes))
    if left >= equal_low + bracket.kept:
        counts = [high for _, _, high in bracket.equals]
        at = _finder(walk, bracket, bracket.high, counts, magnitudes)
        return Place(bracket.high, bracket.above_high, equal_high, at)
    inside = np.concatenate(bracket.inside)
    value = np.partition(inside, left - equal_low)[left - equal_low]
    above = bracket.above_high + equal_high + _count(inside > value)
    counts = [_count(here == value) for here in bracket.inside]
    return Place(float(value), above, sum(counts), _finder(walk, bracket, float(value), counts, magnitudes))


def _finder(
    walk: Walk, bracket: Bracket, value: float, counts: Sequence[int], magnitudes: bool
) -> Callable[[int], int]:
    """`Place.at` of numbers of which every stretch has so many: only the one that it stands in is computed again."""

    def at(count: int) -> int:
        for here, (place, given) in zip(counts, walk(), strict=True):
            if count <= here:
                if magnitudes and isinstance(given, Differences):
                    return place + given.nth(bracket.row, value, count) + 1
                values = _numbers(numbers_of(given)[bracket.row], magnitudes)
                return place + int(np.flatnonzero(values == np.float32(value))[count - 1]) + 1
            count -= here
        raise ValueError("the stream has become shorter")

    return at


def _searcher(walk: Walk, row: int, value: float, magnitudes: bool) -> Callable[[int], int]:
    """`Place.at` where nothing was noted by stretch."""

    def at(count: int) -> int:
        for place, given in walk():
            same = np.flatnonzero(_numbers(numbers_of(given)[row], magnitudes) == np.float32(value))
            if count <= len(same):
                return place + int(same[count - 1]) + 1
            count -= len(same)
        raise ValueError("the stream has become shorter")

    return at


def _count(flags: NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(flags))
