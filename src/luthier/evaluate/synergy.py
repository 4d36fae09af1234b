"""Is a merged model more than the mean of its parents?

    rows = synergy({"domain": (0.62, 0.41, 0.60), "general": (0.35, 0.71, 0.66)})      parent, parent, merged

Of each benchmark: `expected` is the parents' mean, `synergy` the merged score less that, and `emergent` says whether it
is above both parents. The last row, `overall`, is the same of the mean scores. Merging two models that each know one
thing gives positive synergy as soon as the merge forgets less than half of either; only `emergent` is something that no
parent had. A merged score of one benchmark can lie below its better parent and the overall score above both.

The measure of Lu, Luu and Buehler 2025 ("Exploration of training strategies, scaling, model merging and synergistic
capabilities"). It has no interval: hold paired runs against each other (`luthier.evaluate.compare`) before believing a
small one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from luthier.errors import InputError

OVERALL = "overall"


@dataclass(frozen=True)
class Synergy:
    """One row; all scores in the unit that they were given in, higher is better."""

    name: str
    parent1: float
    parent2: float
    merged: float

    @property
    def expected(self) -> float:
        return (self.parent1 + self.parent2) / 2

    @property
    def synergy(self) -> float:
        return self.merged - self.expected

    @property
    def emergent(self) -> bool:
        return self.merged > max(self.parent1, self.parent2)

    def row(self) -> dict[str, float | str | bool]:
        """All figures by name, json-able."""
        return {
            "name": self.name,
            "parent1": self.parent1,
            "parent2": self.parent2,
            "expected": self.expected,
            "merged": self.merged,
            "synergy": self.synergy,
            "emergent": self.emergent,
        }


def synergy(scores: Mapping[str, tuple[float, float, float]]) -> list[Synergy]:
    """A row for each benchmark, and `overall` at the end.

    Args:
        scores: benchmark -> (first parent, second parent, merged model), all higher is better.

    Raises `InputError` if there are none, one is not finite, or a benchmark is called `overall`.
    """
    if not scores:
        raise InputError("there are no scores", where="synergy")
    if OVERALL in scores:
        raise InputError("a benchmark is called overall, which is the name of the mean", where="synergy")
    for name, values in scores.items():
        if len(values) != 3 or not all(math.isfinite(value) for value in values):
            raise InputError(f"{name} needs three finite scores: both parents and merged, got {values!r}")
    rows = [Synergy(name, *map(float, values)) for name, values in scores.items()]
    mean = (fmean(row.parent1 for row in rows), fmean(row.parent2 for row in rows), fmean(row.merged for row in rows))
    return [*rows, Synergy(OVERALL, *mean)]
