"""Choosing entries by their scores: exactly so many, stable under ties; or all below or above a threshold.

Entries that compete are seen as one long vector: the tensors in order, each in C order. Of equal scores the entry
with the lower place wins. Several tensors are ranked by counting (`weights.ranks`), in passes that compute the scores
anew, so nothing of the size of the model is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.errors import InputError
from luthier.tune.selector.slots import Shape
from luthier.weights.ranks import order_statistics, top_cuts

Walk = Callable[[], Iterator[tuple[str, Tensor]]]


# How many


@dataclass(frozen=True)
class Share:
    """floor(density n) of n entries that compete, at least `least`."""

    density: float
    least: int = 0

    def of(self, shapes: Sequence[Shape]) -> int:
        entries = sum(math.prod(shape) for shape in shapes)
        return min(entries, max(self.least, math.floor(self.density * entries + 1e-9)))

    def __str__(self) -> str:
        return f"share {self.density:g}"


@dataclass(frozen=True)
class LoraSize:
    """As many entries as a LoRA of this rank has parameters: (m + n) rank of a matrix (m, n), at most all."""

    rank: int

    def of(self, shapes: Sequence[Shape]) -> int:
        return sum(min((shape[-1] + math.prod(shape[:-1])) * self.rank, math.prod(shape)) for shape in shapes)

    def __str__(self) -> str:
        return f"as many as LoRA of rank {self.rank} has"


@dataclass(frozen=True)
class Number:
    """Exactly `count`."""

    count: int

    def of(self, shapes: Sequence[Shape]) -> int:
        entries = sum(math.prod(shape) for shape in shapes)
        if self.count > entries:
            raise InputError(f"{self.count} entries are to be chosen of {entries}", where="tune", fix="take fewer")
        return self.count

    def __str__(self) -> str:
        return f"{self.count}"


# Which


@dataclass(frozen=True)
class Top:
    """The entries with the largest scores (or, `largest=False`, the smallest), exactly as many as `many` says."""

    many: Share | LoraSize | Number
    largest: bool = True
    narrows: bool = False

    def count(self, shapes: Sequence[Shape]) -> int:
        return self.many.of(shapes)

    def pick(self, walk: Walk, shapes: dict[str, Shape]) -> dict[str, Tensor]:
        sign = 1.0 if self.largest else -1.0
        count = self.count(list(shapes.values()))
        if len(shapes) == 1:
            ((name, scores),) = walk()
            return {name: top_places(sign * scores, count)}
        starts, at = {}, 0
        for name, shape in shapes.items():
            starts[name] = at
            at += math.prod(shape)
        ((cut,),) = top_cuts(
            lambda: ((starts[name], (sign * scores).float().cpu().reshape(1, -1)) for name, scores in walk()), [count]
        )
        return {
            name: cut.above((sign * scores).float().cpu().reshape(-1), starts[name]).nonzero()[:, 0]
            for name, scores in walk()
        }

    def __str__(self) -> str:
        return f"{'top' if self.largest else 'smallest'} ({self.many})"


@dataclass(frozen=True)
class Below:
    """All entries whose score is below the threshold (or, `above`, above it), strictly."""

    threshold: float
    above: bool = False
    narrows: bool = False

    def count(self, shapes: Sequence[Shape]) -> int:
        return sum(math.prod(shape) for shape in shapes)

    def pick(self, walk: Walk, shapes: dict[str, Shape]) -> dict[str, Tensor]:
        def chosen(scores: Tensor) -> Tensor:
            return scores > self.threshold if self.above else scores < self.threshold

        return {name: chosen(scores.reshape(-1)).nonzero()[:, 0].cpu() for name, scores in walk()}

    def __str__(self) -> str:
        return f"{'above' if self.above else 'below'} threshold {self.threshold:g}"


@dataclass(frozen=True)
class Smallest:
    """The entries strictly below the (floor(density n) + 1)-th smallest score: floor(density n) of them, or fewer where
    that one has ties. Scores are ranked as float32."""

    density: float
    narrows: bool = False

    def count(self, shapes: Sequence[Shape]) -> int:
        return Share(self.density).of(shapes)

    def threshold(self, walk: Walk) -> float:
        """That score; infinite if all are to be chosen."""
        (found,) = quantiles(walk, (self.density,))
        return found

    def pick(self, walk: Walk, shapes: dict[str, Shape]) -> dict[str, Tensor]:
        return Below(self.threshold(walk)).pick(walk, shapes)

    def __str__(self) -> str:
        return f"below the threshold of the smallest share {self.density:g}"


def quantiles(walk: Walk, densities: tuple[float, ...]) -> tuple[float, ...]:
    """For each ascending density the (floor(density n) + 1)-th smallest of all n scores; infinity beyond the last.

    `InputError` if there is no score.
    """
    entries = sum(scores.numel() for _, scores in walk())
    if not entries:
        raise InputError("there is no entry to choose from", where="tune")
    ranks = [Share(density).of([(entries,)]) for density in densities]
    found = order_statistics(
        lambda: ((0, scores.float().cpu().reshape(1, -1)) for _, scores in walk()), [min(r, entries - 1) for r in ranks]
    )
    return tuple(math.inf if r >= entries else float(value) for r, value in zip(ranks, found[0], strict=True))


def top_places(scores: Tensor, count: int) -> Tensor:
    """Flat places of the `count` largest entries, ascending int64 on the CPU; of equal ones those with lower places."""
    flat = scores.reshape(-1)
    if count >= flat.numel():
        return torch.arange(flat.numel())
    if count <= 0:
        return torch.zeros(0, dtype=torch.int64)
    value = torch.topk(flat, count, sorted=False).values.min()
    above = flat > value
    equal = (flat == value).nonzero()[:, 0][: count - int(above.sum())]
    above[equal] = True
    return above.nonzero()[:, 0].cpu()
