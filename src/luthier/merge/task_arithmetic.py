"""Task arithmetic: add what each tuning changed to the base they share.

    theta = theta0 + scale * sum_k w_k (theta_k - theta0)

A model's difference to its base (its task vector) stands for the skill; adding several adds skills, a negative weight
takes one away. `scale` matters: the sum grows with the number of models, and 0.3 to 0.4 is usual for several.

When not to use it: where models disagree much in sign or most of a difference is noise (`ties`, `breadcrumbs`); with
models of different bases, whose differences mean nothing.

Ilharco et al. 2023; the yardstick of Yadav et al. 2023 and others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from numpy.typing import NDArray

from luthier.merge.base import Merge, Merged, Shape, Tile
from luthier.merge.fused import combined
from luthier.merge.knobs import knob
from luthier.merge.report import Counts
from luthier.merge.weighting import check_weights, weights_at
from luthier.weights.algebra import lincomb, moved
from luthier.weights.ranks import ALL, NOTHING

if TYPE_CHECKING:
    from torch import Tensor


class TaskArithmetic(Merge):
    """Base plus the weighted sum of differences."""

    method: Literal["task-arithmetic"] = "task-arithmetic"
    per_model: ClassVar[frozenset[str]] = frozenset({"weights"})
    after_survey: ClassVar[frozenset[str]] = frozenset({"scale", "weights"})
    scale: knob() = 0.4  # type: ignore[valid-type]
    weights: tuple[knob(), ...] | None = None  # type: ignore[valid-type]

    def check(self, shape: Shape) -> None:
        check_weights(self.weights, shape)

    def combine(self, tile: Tile, found: Any) -> Merged:
        change = task_arithmetic(tile.deltas, weights_at(self.weights, tile, len(tile.deltas)), tile.at(self.scale))
        return Merged(moved(tile.base, change), tile.deltas)

    def fused(self, tile: Tile, found: Any) -> tuple[Counts, NDArray[Any]] | None:
        factors = [tile.at(self.scale) * weight for weight in weights_at(self.weights, tile, tile.count)]
        return combined(tile, [(NOTHING, ALL)] * tile.count, "add", factors=factors)


def task_arithmetic(deltas: Tensor, weights: Sequence[float], scale: float) -> Tensor:
    """scale * sum of weights[k] deltas[k]: (K, ...) -> (...)."""
    return lincomb(deltas, [scale * weight for weight in weights])
