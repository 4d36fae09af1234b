"""TIES: trim small changes, elect a sign for each weight, and average only the models that agree with it.

    trim     of each model's difference to the base keep the `density` share of largest magnitude, over the whole model
    elect    per weight the sign with the larger total magnitude (the sign of the sum of what was kept)
    merge    per weight the mean of the kept differences that have this sign
    theta = theta0 + scale * merged

Plain averaging divides a change that one model made by their number, and lets opposite changes cancel; here a change
that only one model made passes in full, and a conflict is decided by the stronger side.

Where the kept differences of a weight cancel exactly, the sign that was elected most often over the whole model is
taken (over the tensor for scope: tensor); if there is no majority, nothing changes there. Differences to the authors'
code: exactly max(1, int(d * density)) entries are kept, the lower place winning a tie (`trim: reference` keeps as many
as their code does: one more, and every tie); no majority elects nothing where theirs would keep the negative entries.
`weights` (ours) multiply what was kept before the election and divide the mean; that division would undo a negative
one, so those are for `agg: sum` and `max`.

When not to use it: if the tunings are dense and nearly orthogonal, `task-arithmetic` with a searched scale does as well
(on digits it does better); with a single model it only trims.

Yadav et al. 2023, "Resolving Interference When Merging Models" (algorithm 1). mergekit's `ties` works tensor by tensor
with density 1 by default: here that is scope: tensor, density: 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from numpy.typing import NDArray
from pydantic import Field, model_validator

from luthier.later import torch
from luthier.merge.base import Merge, Merged, Reach, Shape, Tile, Tiles
from luthier.merge.fused import balanced, combined
from luthier.merge.knobs import knob, numbers_of
from luthier.merge.report import Counts
from luthier.merge.weighting import check_weights, weights_at
from luthier.weights.algebra import Agg, agree, balance, elect, moved
from luthier.weights.ranks import ALL, EVERY, NOTHING, Cut, order_statistics, top_cuts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Found:
    """Of each model what stays, and the sign where it cancels exactly."""

    cuts: Sequence[Cut]
    majority: int


class Ties(Merge):
    """Trim, elect sign, merge what agrees."""

    method: Literal["ties"] = "ties"
    paper: ClassVar[int | None] = 85
    per_model: ClassVar[frozenset[str]] = frozenset({"weights"})
    after_survey: ClassVar[frozenset[str]] = frozenset({"scale", "agg"})
    density: float = Field(default=0.2, gt=0, le=1)
    scale: knob() = 1.0  # type: ignore[valid-type]
    weights: tuple[knob(), ...] | None = None  # type: ignore[valid-type]
    agg: Agg = "mean"
    scope: Literal["global", "tensor"] = "global"
    trim: Literal["exact", "reference"] = "exact"

    @property
    def reach(self) -> Reach:
        return "model" if self.scope == "global" else "tensor"

    @property
    def passes(self) -> int:
        return 1 if self.density == 1 and self.trim == "exact" else 4 if self.trim == "exact" else 3

    @model_validator(mode="after")
    def _mean_of_positive_weights(self) -> Ties:
        if self.agg == "mean":
            negative = [n for weight in self.weights or () for n in numbers_of(weight) if n < 0]
            if negative:
                raise ValueError(f"a mean takes no negative weight, got {negative[0]:g}; use agg: sum")
        return self

    def check(self, shape: Shape) -> None:
        check_weights(self.weights, shape)

    def survey(self, tiles: Tiles) -> Found:
        kept = int(tiles.elements * self.density)
        if self.trim == "reference":  # 1-based rank of the threshold among all magnitudes, ascending: elements - kept
            smallest = max(tiles.elements - kept, 1) - 1
            found = order_statistics(tiles.differences, [smallest], magnitudes=True, expected=tiles.elements)[:, 0]
            cuts = [Cut(float(value), EVERY) for value in found]
        elif kept == tiles.elements:
            cuts = [ALL] * next(iter(tiles())).count
        else:
            above = top_cuts(tiles.differences, [max(1, kept)], magnitudes=True, expected=tiles.elements)
            cuts = [row[0] for row in above]
        total = sum(tiles.each(lambda tile: self._balance(tile, cuts)))
        return Found(cuts, int(total > 0) - int(total < 0))

    def combine(self, tile: Tile, found: Found) -> Merged:
        trimmed = self._trimmed(tile, found.cuts)
        weights = None if self.weights is None else weights_at(self.weights, tile, len(trimmed))
        change = ties(trimmed, found.majority, weights=weights, agg=self.agg) * tile.at(self.scale)
        return Merged(moved(tile.base, change), trimmed)

    def fused(self, tile: Tile, found: Found) -> tuple[Counts, NDArray[Any]] | None:
        weights = None if self.weights is None else weights_at(self.weights, tile, tile.count)
        cuts = [(NOTHING, cut) for cut in found.cuts]
        return combined(
            tile, cuts, self.agg, weights=weights, factors=weights, tie=found.majority, scale=tile.at(self.scale)
        )

    def _balance(self, tile: Tile, cuts: Sequence[Cut]) -> int:
        weights = None if self.weights is None else weights_at(self.weights, tile, tile.count)
        found = balanced(tile, [(NOTHING, cut) for cut in cuts], weights)
        return balance(elect(self._trimmed(tile, cuts))) if found is None else found

    def _trimmed(self, tile: Tile, cuts: Sequence[Cut]) -> Tensor:
        trimmed = trim(tile.deltas, cuts, tile.place)
        if self.weights is not None:
            for delta, weight in zip(trimmed, weights_at(self.weights, tile, len(trimmed)), strict=True):
                delta *= weight
        return trimmed

    def notes(self, found: Found) -> dict[str, Any]:
        return {"thresholds": [cut.value for cut in found.cuts], "majority_sign": found.majority}


def trim(deltas: Tensor, cuts: Sequence[Cut], place: int) -> Tensor:
    """(K, ...) float32 with 0 wherever a magnitude is not above its model's cut.

    Args:
        place: of the first element, as the cuts count them.
    """
    trimmed = torch.empty_like(deltas)
    for cut, delta, out in zip(cuts, deltas, trimmed, strict=True):
        cut.keep(delta, place, out)
    return trimmed


def ties(trimmed: Tensor, majority: int, *, weights: Sequence[float] | None, agg: Agg) -> Tensor:
    """Elect and merge: (K, ...) trimmed differences -> (...) merged difference.

    Args:
        majority: sign to take where the trimmed differences cancel exactly: -1, 0 or 1.
    """
    return agree(trimmed, elect(trimmed, tie=majority), weights, agg)
