"""Linear: a weighted mean of whole models. The plainest merge, and the yardstick of all others.

    theta = sum_k w_k theta_k / sum_k w_k          (normalise: false leaves the divisor out)

With equal weights it is the average, or a uniform soup. It needs no base. A single model with weight 1 comes out as
it went in, bit for bit, and so do K copies of one model up to one rounding.

When not to use it: for models that were tuned on different tasks from one base; averaging K of them keeps a K-th of
what each has learned (`task-arithmetic`, `ties`). For models without a common ancestor average only after matching
their units (`pleas`).

Wortsman et al. 2022 (model soups); mergekit's `linear` is the same arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from numpy.typing import NDArray
from pydantic import model_validator

from luthier.errors import InputError
from luthier.merge.base import Merge, Merged, Shape, Tile
from luthier.merge.fused import blended
from luthier.merge.knobs import Knob, knob
from luthier.merge.report import Counts
from luthier.merge.weighting import check_weights, weights_at
from luthier.weights.algebra import lincomb

if TYPE_CHECKING:
    from torch import Tensor


class Linear(Merge):
    """Weighted mean of models."""

    method: Literal["linear"] = "linear"
    needs_base: ClassVar[bool] = False
    per_model: ClassVar[frozenset[str]] = frozenset({"weights"})
    after_survey: ClassVar[frozenset[str]] = frozenset({"weights", "normalise"})
    weights: tuple[knob(), ...] | None = None  # type: ignore[valid-type]
    normalise: bool = True

    @model_validator(mode="after")
    def _some_weight(self) -> Linear:
        if self.weights is not None and all(weight == 0 for weight in self.weights):
            raise ValueError("all weights are 0")
        return self

    def check(self, shape: Shape) -> None:
        check_weights(self.weights, shape)

    def combine(self, tile: Tile, found: Any) -> Merged:
        return Merged(linear(tile.models, factors(self.weights, tile, len(tile.models), self.normalise)))

    def fused(self, tile: Tile, found: Any) -> tuple[Counts, NDArray[Any]] | None:
        """None where there is a base, which is not looked at, or a model comes out as it is."""
        each = factors(self.weights, tile, tile.count, self.normalise)
        return None if sum(factor != 0 for factor in each) == 1 else blended(tile, each)


def linear(models: Tensor, factors: list[float]) -> Tensor:
    """Sum of factors[k] models[k], (K, ...) float32; one model with factor 1 is returned as it is."""
    moving = [(model, factor) for model, factor in zip(models, factors, strict=True) if factor != 0]
    if len(moving) == 1 and moving[0][1] == 1:
        return moving[0][0]
    return lincomb(models, factors)


def factors(weights: tuple[Knob, ...] | None, tile: Tile, count: int, normalise: bool) -> list[float]:
    """The factor of each model for one tensor."""
    plain = weights_at(weights, tile, count)
    total = sum(plain) if normalise else 1.0
    if total == 0:
        raise InputError(f"the weights sum to 0 at {tile.name}", where="weights", fix="set normalise: false")
    return [weight / total for weight in plain]
