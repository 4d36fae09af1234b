"""Exact ranks of numbers that are never all in memory: order statistics and rank cuts over a stream of tiles.

A merge keeps, say, the fifth of all weights that moved most. Sorting them would need the whole vector in memory, and
several times over. Here a sample tells about where the fifth ends, and a second pass over the stream makes it exact
(see `brackets`); memory stays the same whatever the number of elements. `-0.0` and `0.0` are one value.

Equal numbers are told apart by their place, counted through the stream: the lower place ranks first. That makes counts
exact and stable. Differences of 16-bit weights lie on a coarse grid, so ties at the threshold are the rule there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.later import torch
from luthier.weights.brackets import Place, ranked
from luthier.weights.counting import Walk

if TYPE_CHECKING:
    from torch import Tensor

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


NOTHING, ALL = Cut(float("inf"), 0), Cut(float("-inf"), EVERY)  # above which there is nothing, and everything


def order_statistics(walk: Walk, ranks: Sequence[int], *, magnitudes: bool = False, expected: int = 0) -> Tensor:
    """The numbers at ascending 0-based `ranks` of each row: (K, len(ranks)) float32, exact.

    At most two passes over `walk` (four where a guess fails). Every rank must be below the number of elements; rows
    must not hold NaN.

    Args:
        magnitudes: rank by absolute value; the magnitudes are returned.
        expected: how many numbers a row has, if it is known.
    """
    found, _ = ranked(walk, lambda total: ranks, magnitudes, expected)
    return torch.tensor([[place.value for place in row] for row in found])


def top_cuts(walk: Walk, counts: Sequence[int], *, magnitudes: bool = False, expected: int = 0) -> list[list[Cut]]:
    """For each row and each count the `Cut` above which exactly so many numbers stand.

    Of equal numbers the earlier ones are above. A count of 0 gives a cut above everything, one of all elements a cut
    below everything. At most two passes over `walk` (four where a guess fails), and one tile again where equal numbers
    must be told apart.

    Args:
        magnitudes: rank by absolute value.
        expected: how many numbers a row has, if it is known.
    """

    def ranks(total: int) -> list[int]:
        return sorted(min(max(total - count, 0), total - 1) for count in counts)

    found, total = ranked(walk, ranks, magnitudes, expected)
    by_rank = [dict(zip(ranks(total), row, strict=True)) for row in found]
    return [[_cut(places, count, total) for count in counts] for places in by_rank]


def _cut(places: dict[int, Place], count: int, total: int) -> Cut:
    if count <= 0:
        return NOTHING
    if count >= total:
        return ALL
    place = places[total - count]
    ties = count - place.above
    return Cut(place.value, EVERY if ties >= place.equal else place.at(ties))


def _before(value: float) -> Tensor:
    """The largest float32 below `value` > 0."""
    return torch.nextafter(torch.tensor(value, dtype=torch.float32), torch.tensor(0.0))
