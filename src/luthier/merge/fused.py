"""Merges of rows as files hold them, in one compiled pass: read, merged, rounded to the stored type, and counted.

    combined     base + scale * what is kept of the differences (task arithmetic, ties, breadcrumbs)
    balanced     the survey of ties: how many more places elect plus than minus
    blended      the weighted sum of whole models (linear)

A method calls them in its `fused`, with what its `combine` would do in torch's operations, which stays the definition:
for adapters, deltas, models in memory and mapped vocabularies, and where a number is not finite. Each gives None in
those cases. The passes themselves are in `luthier.weights.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.merge.base import Tile
from luthier.merge.report import Counts
from luthier.weights.algebra import Agg
from luthier.weights.ranks import Cut

How = Literal["add"] | Agg
HOW: dict[How, int] = {"add": 0, "mean": 1, "sum": 2, "max": 3}  # as `kernels.combine` numbers them
Cuts = Sequence[tuple[Cut, Cut]]


def combined(
    tile: Tile,
    cuts: Cuts,
    how: How,
    *,
    weights: Sequence[float] | None = None,
    factors: Sequence[float] | None = None,
    tie: int = 0,
    scale: float = 1.0,
) -> tuple[Counts, NDArray[Any]] | None:
    """moved(base, change * scale): counts, and (n,) of the type of `Tile.stored`.

    Args:
        cuts: of each model; what is above the second and not above the first is kept of its differences.
        how: `add` is lincomb(kept, factors); the others are those of `agree` with the elected sign.
        weights: what is kept is multiplied by them; None is 1 each.
        factors: of the models in the sum; for `mean` in the divisor.
        tie: the sign that is elected where a sum is exactly 0.
    """
    sides = tile.stored
    if sides is None:
        return None
    from luthier.weights.kernels import combine

    values, places = _cuts(cuts, tile.place, sides.shape[1])
    each, into = _numbers(weights, tile.count), _numbers(factors, tile.count)
    merged, counts, squares, fine = combine(
        sides, values, places, each, into, HOW[how], np.float32(tie), np.float32(scale)
    )
    if not fine:
        return None
    elements, (*kept, some, several, conflicts) = sides.shape[1], counts.tolist()
    shared = (elements - some, some - several, several) if tile.count > 1 else None
    base, *models = squares.tolist()
    about = Counts(tile.name, tile.size, elements, kept, models, base, shared, conflicts, {})
    return about, merged


def balanced(tile: Tile, cuts: Cuts, weights: Sequence[float] | None) -> int | None:
    """balance(elect(kept)) of what `combined` keeps."""
    sides = tile.stored
    if sides is None:
        return None
    from luthier.weights.kernels import balance

    return int(balance(sides, *_cuts(cuts, tile.place, sides.shape[1]), _numbers(weights, tile.count)))


def blended(tile: Tile, factors: Sequence[float]) -> tuple[Counts, NDArray[Any]] | None:
    """lincomb(models, factors) of a tile without a base."""
    if tile.stored is None or len(tile.stored) != len(factors):
        return None
    from luthier.weights.kernels import blend

    merged, fine = blend(tile.stored, _numbers(factors, tile.count))
    if not fine:
        return None
    return Counts(tile.name, tile.size, len(merged), [], [], 0.0, None, 0, {}), merged


def _cuts(cuts: Cuts, place: int, elements: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(K, 2) values, and (K, 2) places counted from the tile's first element."""
    values = np.array([[cut.value for cut in pair] for pair in cuts], np.float32)
    return values, np.array([[min(max(cut.place - place, 0), elements) for cut in pair] for pair in cuts], np.int64)


def _numbers(given: Sequence[float] | None, count: int) -> NDArray[np.float32]:
    return np.ones(count, np.float32) if given is None else np.array(given, np.float32)
