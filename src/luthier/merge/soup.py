"""Soup: the average of models that were tuned from one start; greedy, it takes in only those that help.

    uniform    theta = sum_k w_k theta_k / sum_k w_k             w_k = 1 unless `weights` says otherwise
    greedy     sort the models by their score, best first; begin with the best; take the next one in if the score of
               the average with it is no worse than that of the average without it (less `tolerance`)
    max        greedy with most: 1, the best model alone

For the moment when one more instruction set in the mix no longer helps: tune the same start on the base mix plus each
candidate set, and average the models instead of the data. Models may also differ in learning rate or seed. An average
is as large and as fast as one model.

Greedy needs `evaluate`, a callable that gives a model's score. It is called once for each model and once for each
acceptance test. It must look at validation rows: the search chooses by it, so a score on test rows would be no test
any more. With tolerance 0 the outcome scores no lower than the best single model there, by construction; of other rows
that promises nothing. Each acceptance may cost up to `tolerance`, so K of them up to K times that.

Models of equal score stand in the order in which they were given. Sums are in float32; the authors' script of POINTS
adds in bfloat16 and has the uniform soup only. `merge.json` has all scores, and who was taken in and who was not.

When not to use it: for models without a common start (`pleas` first); for models of different tasks, whose average
keeps a K-th of what each has learned (`task-arithmetic`, `ties`). Running statistics of batch normalisation are
averaged like everything else and should be measured anew. For weights that differ by tensor or are negative: `linear`.

Wortsman et al. 2022, "Model soups" (recipe 1); Liu et al. 2024, "POINTS" (individual select and soup). mergekit's
`linear` with equal weights is the uniform soup; it has no search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator
from torch import Tensor

from luthier.errors import InputError
from luthier.merge.base import Choice, Merge, Merged, ScoreOf, Shape, Tile
from luthier.weights.algebra import lincomb

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Soup(Merge):
    """Average of models, of all or of those that help."""

    method: Literal["soup"] = "soup"
    paper: ClassVar[int | None] = 74
    needs_base: ClassVar[bool] = False
    weights: tuple[Weight, ...] | None = Field(None, description="Of the models, in their order; null: equal.")
    greedy: bool = Field(False, description="Take in only models that do not lower the score.")
    tolerance: float = Field(0.0, ge=0, allow_inf_nan=False, description="How much an acceptance may cost.")
    higher_is_better: bool = Field(True, description="Whether a higher score is the better one.")
    most: int | None = Field(None, ge=1, description="Most models in a greedy soup; 1 is the best one alone.")

    @model_validator(mode="after")
    def _meaningful(self) -> Soup:
        if self.weights is not None and not any(self.weights):
            raise ValueError("all weights are 0")
        if self.greedy and self.weights is not None and not all(self.weights):
            raise ValueError("a model of weight 0 cannot be tested by greedy; leave it out")
        if not self.greedy:
            given = [n for n in ("tolerance", "higher_is_better", "most") if n in self.model_fields_set]
            idle = [n for n in given if getattr(self, n) != type(self).model_fields[n].default]
            if idle:
                raise ValueError(f"{' and '.join(idle)} steer the greedy search; set greedy: true")
        return self

    @property
    def searches(self) -> bool:
        return self.greedy

    def check(self, shape: Shape) -> None:
        if self.weights is not None and len(self.weights) != shape.models:
            raise InputError(f"{len(self.weights)} weights for {shape.models} models", where="weights")

    def search(self, count: int, score: ScoreOf) -> Choice:
        if self.weights is not None and len(self.weights) != count:
            raise InputError(f"{len(self.weights)} weights for {count} models", where="weights")

        def of(models: Sequence[int]) -> float:
            return score(self._of(models), models)

        found = greedy(count, of, tolerance=self.tolerance, higher_is_better=self.higher_is_better, most=self.most)
        log = {
            "scores": found.alone,
            "tests": [test._asdict() for test in found.tests],
            "accepted": sorted(found.chosen),
            "rejected": sorted(set(range(count)) - set(found.chosen)),
            "score": found.score,
            "best_single": found.alone[found.chosen[0]],
        }
        return Choice(self._of(found.chosen), found.chosen, log)

    def _of(self, models: Sequence[int]) -> Soup:
        """The soup of these models, without a search."""
        return Soup(weights=None if self.weights is None else tuple(self.weights[k] for k in models))

    def combine(self, tile: Tile, found: Any) -> Merged:
        return Merged(soup(tile.models, self.weights or [1.0] * len(tile.models)))


def soup(models: Tensor, weights: Sequence[float]) -> Tensor:
    """Weighted mean of (K, ...) float32 models by K weights >= 0, not all 0; those of weight 0 have no part in it."""
    largest = max(weights)
    shares = [weight / largest for weight in weights]  # so that a model alone is multiplied by 1
    some = [k for k, share in enumerate(shares) if share]
    chosen = models if len(some) == len(shares) else models[some]
    return lincomb(chosen, [shares[k] for k in some]).div_(sum(shares))


class Trial(NamedTuple):
    """One acceptance test: whether `model` was taken in, when the average with it scored `score`."""

    model: int
    score: float
    accepted: bool


class Found(NamedTuple):
    """What a greedy search found: models in the order of acceptance, its score, each model's own, and all tests."""

    chosen: list[int]
    score: float
    alone: list[float]
    tests: list[Trial]


def greedy(
    count: int,
    score: Callable[[Sequence[int]], float],
    *,
    tolerance: float = 0.0,
    higher_is_better: bool = True,
    most: int | None = None,
) -> Found:
    """Greedy choice among `count` models (0, 1, ...) by the `score` of a set of them.

    A model is taken in if score(with it) >= score(without) - tolerance (lower is better: <= and + tolerance). Models
    of equal score are tried in their order. `most` ends the search when so many are chosen.
    """
    sign = 1.0 if higher_is_better else -1.0
    alone = [score([k]) for k in range(count)]
    order = sorted(range(count), key=lambda k: -sign * alone[k])
    chosen, current = [order[0]], alone[order[0]]
    tests: list[Trial] = []
    for k in order[1:]:
        if most is not None and len(chosen) >= most:
            break
        value = score([*chosen, k])
        accepted = sign * value >= sign * current - tolerance
        tests.append(Trial(k, value, accepted))
        if accepted:
            chosen, current = [*chosen, k], value
    return Found(chosen, current, alone, tests)
