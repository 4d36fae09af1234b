"""PCB: every weight of every model gets a coefficient of its own, from how much it matters and how far others agree.

All differences of a model are one row T_k of d numbers; minmax(x) = (x - min) / (max - min) along a row.

    clamp     a = |T|, but not below its q nor above its 1 - q quantile (q = `clip_quantile`);  C = sign(T) a
    intra     I = exp(K minmax(a)^2)                      a large change matters within its model
    inter     J = tanh(T s), s = sum_k T_k                negative where a model opposes the sum
              (`sum_normalized`: s = sum_k sign(T_k) minmax(a)_k, so that models count alike)
    score     B = I J; of each row the `density` share of highest scores stays, the rest is 0, and S = minmax(B) of it
    theta = theta0 + sum_k scale_k S_k C_k / sum_k S_k

Where one model alone stays, it passes in full whatever its score; scores decide where several do; where none does, the
base stays. `scale` is one number, or a list with one for each model (which `merge_search` can find).

As in the authors' code, quantiles are the very numbers at ranks int(d q) and int(d (1 - q) - 1), and rank
int(d (1 - density)) of the scores is the highest that is dropped, with all that equal it. A row without a spread (all
magnitudes the same after the clamp, or nothing above the dropped scores) makes their code divide by 0; here its model
adds nothing, and a warning says so. With more than 80 models the exponent is taken from 80, since e^89 is no float32.
Scores are made in float64 and rounded, so that they do not depend on how a tensor is cut into tiles.

When not to use it: TIES did as well or better in our proofs; with one model there is nothing to balance; where under
2 q of a model's weights moved, the clamp leaves no spread (set `clip_quantile` lower).

Du et al. 2024, "Parameter Competition Balancing for Model Merging". Their paper writes softmax where their code, and
this, has exp and tanh; the row's constant disappears in minmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from luthier.errors import InputError
from luthier.findings import Finding
from luthier.merge.base import Merge, Merged, Reach, Shape, Tile, Tiles
from luthier.merge.knobs import knob, value_of
from luthier.weights.algebra import moved
from luthier.weights.ranks import order_statistics

Inter = Literal["sum", "sum_normalized"]
_LARGEST = 80  # of the exponent: e^80 times a small product is still a float32


@dataclass(frozen=True)
class Found:
    """Of each model, (K, 1, 1) float32: the clamp, and the scores that become 0 and 1."""

    low: Tensor
    high: Tensor
    dropped: Tensor
    best: Tensor


class Pcb(Merge):
    """Balance weights by importance and agreement."""

    method: Literal["pcb"] = "pcb"
    paper: ClassVar[int | None] = 29
    per_model: ClassVar[frozenset[str]] = frozenset({"scale"})
    after_survey: ClassVar[frozenset[str]] = frozenset({"scale"})
    density: float = Field(default=0.1, gt=0, lt=1)
    scale: FiniteFloat | tuple[knob(), ...] = 1.2  # type: ignore[valid-type]
    clip_quantile: float = Field(default=0.01, ge=0, lt=0.5)
    inter: Inter = "sum"

    @property
    def reach(self) -> Reach:
        return "model"

    @property
    def passes(self) -> int:
        return 4

    def check(self, shape: Shape) -> None:
        if isinstance(self.scale, float):
            return
        if len(self.scale) != shape.models:
            raise InputError(f"{len(self.scale)} numbers for {shape.models} models", where="scale")
        for scale in self.scale:
            for name in shape.names:
                value_of(scale, name, shape.depth_of(name))

    def survey(self, tiles: Tiles) -> Found:
        total = sum({tile.name: tile.size for tile in tiles()}.values())  # no numbers are read
        low_rank = int(total * self.clip_quantile)
        high_rank = max(int(total * (1 - self.clip_quantile) - 1), low_rank)
        dropped_rank = min(int(total * (1 - self.density)), total - 1)

        def sizes() -> Iterator[tuple[int, Tensor]]:
            return ((tile.place, tile.deltas.abs()) for tile in tiles())

        def made() -> Iterator[tuple[int, Tensor]]:
            return ((tile.place, scores(tile.deltas, low, high, self.inter)) for tile in tiles())

        low, high = _columns(order_statistics(sizes, [low_rank, high_rank]))
        dropped, best = _columns(order_statistics(made, [dropped_rank, total - 1]))
        return Found(low, high, dropped, best)

    def combine(self, tile: Tile, found: Found) -> Merged:
        shares = shares_of(scores(tile.deltas, found.low, found.high, self.inter), found.dropped, found.best)
        clamped = clamp(tile.deltas, found.low, found.high)
        scale = self.scale
        scales = [scale] * tile.count if isinstance(scale, float) else [tile.at(number) for number in scale]
        change = balance(shares, clamped, scales)
        return Merged(moved(tile.base, change), torch.where(shares > 0, clamped, 0.0))

    def notes(self, found: Found) -> dict[str, Any]:
        return {name: getattr(found, name).view(-1).tolist() for name in ("low", "high", "dropped", "best")}

    def findings(self, found: Found, models: Sequence[str]) -> list[Finding]:
        told = []
        if len(models) < 2:
            text = "pcb of one model weighs its weights against each other only; there is no other to compete with"
            told.append(Finding(level="warn", code="merge.alone", message=text, value=len(models), limit=2))
        flat = ~((found.high > found.low) & (found.best > found.dropped)).view(-1)
        for label, none in zip(models, flat.tolist(), strict=True):
            if none:
                text = f"{label} adds nothing: its changes have no spread between the clamps, or no score stands out"
                told.append(Finding(level="warn", code="merge.no_spread", message=text))
        return told


def _columns(rows: Tensor) -> Iterator[Tensor]:
    """The columns of (K, n), each as (K, 1, 1)."""
    return (column.view(-1, 1, 1) for column in rows.unbind(1))


def clamp(deltas: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """C of step 1: magnitudes between `low` and `high`, signs as they were, zeros as they were. (K, ...), (K, 1, 1)."""
    return deltas.sign() * torch.clamp(deltas.abs(), low, high)


def scores(deltas: Tensor, low: Tensor, high: Tensor, inter: Inter) -> Tensor:
    """B of steps 2 to 4: (K, rows, columns) float32; 0 in the rows of a model without a spread."""
    wide, low, high = deltas.double(), low.double(), high.double()
    spread = high > low
    sizes = torch.where(spread, (torch.clamp(wide.abs(), low, high) - low) / torch.where(spread, high - low, 1.0), 0.0)
    count = len(deltas)
    importance = torch.exp(count * sizes.square() - max(0, count - _LARGEST))
    total = wide.sum(0) if inter == "sum" else (wide.sign() * sizes).sum(0)
    return torch.where(spread, importance * torch.tanh(wide * total), 0.0).float()


def shares_of(made: Tensor, dropped: Tensor, best: Tensor) -> Tensor:
    """S of step 4, 0 to 1: (K, ...) scores between what is dropped and the best; 0 for a row where these are equal."""
    spread = best > dropped
    shares = (torch.maximum(made, dropped) - dropped) / torch.where(spread, best - dropped, 1.0)
    return torch.where(spread, shares, 0.0)


def balance(shares: Tensor, clamped: Tensor, scales: Sequence[float]) -> Tensor:
    """Step 5: sum_k scales[k] S_k C_k / max(sum_k S_k, 1e-12): (K, ...), (K, ...) -> (...).

    Shares are divided before they multiply, so that what one model alone keeps passes to the last bit.
    """
    factors = torch.tensor(scales, dtype=clamped.dtype).view(-1, *[1] * (clamped.ndim - 1))
    return (factors * clamped * (shares / shares.sum(0).clamp(min=1e-12))).sum(0)
