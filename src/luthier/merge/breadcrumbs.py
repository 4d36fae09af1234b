"""Breadcrumbs: of each model's change keep neither the largest nor the many small ones, and add what is left.

    rank        the magnitudes of a difference, per tensor, the largest first
    leave out   the `drop_top` share of the largest (outliers) and all behind the next `density` share
    theta = theta0 + scale * sum_k kept_k

The sum grows with the number of models, as the sum of task arithmetic does, but its three numbers, found with few
models, are said to serve for more. `sign_consensus` elects a sign per weight first, as TIES does (a sum of 0 elects
plus), and adds only what agrees.

Three conventions for its two shares are about. Here `density` is the share kept and `drop_top` the share of largest
ones left out; the paper's `beta` and `gamma` (a weight stays if its rank, counted from the smallest, lies in [beta,
gamma)) are taken too and turned into these. Counts are int(n * share), without rounding. With order: keep_first the
`density` share is kept first and `drop_top` then taken from it, so that less stays.

Differences: the paper's text ranks over a tensor, its code inside each row (`scope: row`; a single number then moves
in full, as there). For equal magnitudes the earlier is the larger one. Where density and drop_top exceed 1 we refuse;
mergekit shrinks the outliers' share instead, and at density 1 it keeps them all.

When not to use it: where the largest changes are the skill and not accidents (compare drop_top: 0); on small tensors,
of which int(n * density) may be nothing at all; rows of a 3 by 3 convolution have 3 numbers.

Davari and Belilovsky 2024, "Model Breadcrumbs". mergekit's `breadcrumbs` and `breadcrumbs_ties` are the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from numpy.typing import NDArray
from pydantic import Field, model_validator

from luthier.later import torch
from luthier.merge.base import Merge, Merged, Reach, Tile, Tiles
from luthier.merge.fused import How, combined
from luthier.merge.knobs import knob
from luthier.merge.report import Counts
from luthier.weights.algebra import agree, elect, lincomb, moved
from luthier.weights.ranks import ALL, NOTHING, Cut, top_cuts

if TYPE_CHECKING:
    from torch import Tensor

Found = Sequence[tuple[Cut, Cut]]  # per model: above the first are the outliers, above the second they and the kept


class Breadcrumbs(Merge):
    """Mask the largest and the small changes, then add."""

    method: Literal["breadcrumbs"] = "breadcrumbs"
    paper: ClassVar[int | None] = 16
    after_survey: ClassVar[frozenset[str]] = frozenset({"scale", "sign_consensus"})
    density: float = Field(default=0.15, gt=0, le=1)
    drop_top: float = Field(default=0.007, ge=0, lt=1)
    scale: knob() = 0.3  # type: ignore[valid-type]
    scope: Literal["tensor", "row"] = "tensor"
    order: Literal["remove_first", "keep_first"] = "remove_first"
    sign_consensus: bool = False

    @model_validator(mode="before")
    @classmethod
    def _of_the_paper(cls, given: Any) -> Any:
        """`beta` and `gamma` as `density` and `drop_top`."""
        if not isinstance(given, Mapping) or not {"beta", "gamma"} & set(given):
            return given
        if {"density", "drop_top"} & set(given) or not {"beta", "gamma"} <= set(given):
            raise ValueError("give either density and drop_top, or both beta and gamma")
        rest = {name: value for name, value in given.items() if name not in ("beta", "gamma")}
        beta, gamma = (float(given[name]) for name in ("beta", "gamma"))
        if not 0 <= beta < gamma <= 1:
            raise ValueError(f"expected 0 <= beta < gamma <= 1, got beta {beta:g} and gamma {gamma:g}")
        kept = 1 - beta if rest.get("order") == "keep_first" else gamma - beta
        return rest | {"density": round(kept, 12), "drop_top": round(1 - gamma, 12)}

    @model_validator(mode="after")
    def _shares_fit(self) -> Breadcrumbs:
        if self.order == "keep_first" and self.drop_top >= self.density:
            raise ValueError(f"drop_top {self.drop_top:g} leaves nothing of density {self.density:g}")
        if self.order == "remove_first" and round(self.density + self.drop_top, 12) > 1:
            raise ValueError(f"density {self.density:g} and drop_top {self.drop_top:g} are more than 1 together")
        return self

    @property
    def reach(self) -> Reach:
        return "tensor" if self.scope == "tensor" else "tile"

    @property
    def passes(self) -> int:
        return 3 if self.scope == "tensor" else 0

    def survey(self, tiles: Tiles) -> Found:
        first = next(iter(tiles()))
        start, stop = window(first.size, self.density, self.drop_top, self.order)
        if start == stop:
            return [(NOTHING, NOTHING)] * first.count
        if stop - start == first.size:
            return [(NOTHING, ALL)] * first.count
        cuts = top_cuts(tiles.differences, [start, stop], magnitudes=True, expected=tiles.elements)
        return [(above, within) for above, within in cuts]

    def combine(self, tile: Tile, found: Found | None) -> Merged:
        if found is not None:
            kept = crumbs(tile.deltas, found, tile.place)
        elif tile.shape:
            start, stop = window(tile.deltas.shape[-1], self.density, self.drop_top, self.order)
            kept = crumbs_of_rows(tile.deltas, start, stop)
        else:
            kept = tile.deltas
        total = agree(kept, elect(kept, tie=1), agg="sum") if self.sign_consensus else lincomb(kept, [1.0] * len(kept))
        return Merged(moved(tile.base, total * tile.at(self.scale)), kept)

    def fused(self, tile: Tile, found: Found | None) -> tuple[Counts, NDArray[Any]] | None:
        """None for scope: row, which sorts."""
        how: How = "sum" if self.sign_consensus else "add"
        return None if found is None else combined(tile, found, how, tie=1, scale=tile.at(self.scale))


def window(size: int, density: float, drop_top: float, order: Literal["remove_first", "keep_first"]) -> tuple[int, int]:
    """Which ranks (0 is the largest magnitude) of `size` numbers are kept: from the first to before the second."""
    start, count = int(size * drop_top), int(size * density)
    stop = min(start + count, size) if order == "remove_first" else count
    return min(start, stop), stop


def crumbs(deltas: Tensor, cuts: Found, place: int) -> Tensor:
    """(K, ...) float32, 0 but for what is above a model's second cut and not above its first.

    Args:
        place: of the first element, as the cuts count them.
    """
    kept, largest = torch.empty_like(deltas), torch.empty_like(deltas[0])
    for (outliers, within), delta, out in zip(cuts, deltas, kept, strict=True):
        within.keep(delta, place, out)
        outliers.keep(delta, place, largest)
        out -= largest
    return kept


def crumbs_of_rows(deltas: Tensor, start: int, stop: int) -> Tensor:
    """(..., n) float32, 0 but for ranks `start` to before `stop` of each row's magnitudes, the largest first."""
    order = torch.sort(deltas.abs(), dim=-1, descending=True, stable=True).indices[..., start:stop]
    return torch.zeros_like(deltas).scatter_(-1, order, deltas.gather(-1, order))
