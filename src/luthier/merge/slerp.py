"""SLERP: on the way from one model to another, along the circle between their directions. No base, no data.

Of each tensor, as one long vector, with omega the angle between a (t = 0) and b (t = 1):

    theta = x a + y b        x = sin((1-t) omega) / sin(omega)        y = sin(t omega) / sin(omega)

The straight mean of two vectors is shorter than both; the circle keeps the length. `norm: raw` multiplies the factors
to a and b as they are, which is what mergekit does and what the paper's models were made with; `norm: geometric` is the
paper's formula: the same directions, of length |a|^(1-t) |b|^t. For |a| = |b| they agree.

`t` may vary along depth and by pattern. The paper merges a model tuned on a domain (b) with the general one (a) by

    t: {self_attn: [0, 0.5, 0.3, 0.7, 1], mlp: [1, 0.5, 0.7, 0.3, 0], "*": 0.5}

Where the cosine is beyond `dot_threshold`, in either direction, the way is straight: (1-t) a + t b. Two tunings of one
base are usually that close, so the report counts how many tensors went which way. Opposed tensors cancel at t = 0.5.
Differences to mergekit: dot and norms in float64; a tensor of zeros takes the straight way, where mergekit sees a right
angle and makes b shorter by sin(t pi/2).

With a base there may be one other model, or two of which one is the base: it is t = 0 whatever the order, as in
mergekit. When not to use it: for more than two models (`linear`); and at t = 0.5 for models that are much alike: there
`raw` is their mean times 1/cos(omega/2), so with a cosine of 0.98 the mean, half a percent longer.

Lu, Luu and Buehler 2025, "Fine-tuning large language models for domain adaptation" (npj Computational Materials 11:84).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import InputError
from luthier.merge.base import Merge, Merged, Reach, Shape, Tile, Tiles
from luthier.merge.knobs import knob, value_of
from luthier.merge.sources import Source
from luthier.weights.algebra import lincomb, slerp_factors


@dataclass(frozen=True)
class Angle:
    """Of two whole tensors: the product and both lengths, in float64."""

    dot: float
    norm_a: float
    norm_b: float

    @property
    def cosine(self) -> float:
        """0 if one of them is zero."""
        lengths = self.norm_a * self.norm_b
        return max(-1.0, min(1.0, self.dot / lengths)) if lengths else 0.0


class Slerp(Merge):
    """Spherical interpolation of two models."""

    method: Literal["slerp"] = "slerp"
    paper: ClassVar[int | None] = 17
    needs_base: ClassVar[bool] = False
    models_allowed: ClassVar[tuple[int, int | None]] = (2, 2)
    after_survey: ClassVar[frozenset[str]] = frozenset({"t", "norm", "dot_threshold"})
    t: knob(0.0, 1.0) = 0.5  # type: ignore[valid-type]
    norm: Literal["raw", "geometric"] = "raw"
    dot_threshold: float = Field(default=0.9995, ge=0, lt=1)

    @property
    def reach(self) -> Reach:
        return "tensor"

    @property
    def passes(self) -> int:
        return 1

    def arrange(self, base: Source | None, models: Sequence[Source]) -> tuple[Source | None, list[Source]]:
        """The two models, that of t = 0 first."""
        if base is None or len(models) > 2:
            return None, list(models)  # another number of them is refused by `models_allowed`
        if len(models) == 1:
            return None, [base, models[0]]
        first, second = models
        if same(base, first):
            return None, [first, second]
        if same(base, second):
            return None, [second, first]
        raise InputError(
            f"the base is neither {first.label} nor {second.label}",
            where=base.label,
            fix="slerp has no base of its own: name as base the model of t = 0, or leave it out",
        )

    def check(self, shape: Shape) -> None:
        for name in shape.names:
            value_of(self.t, name, shape.depth_of(name))

    def survey(self, tiles: Tiles) -> Angle:
        dot = square_a = square_b = 0.0
        for tile in tiles():
            a, b = tile.models.double()
            dot += float((a * b).sum())
            square_a += float(a.square().sum())
            square_b += float(b.square().sum())
        return Angle(dot, square_a**0.5, square_b**0.5)

    def combine(self, tile: Tile, found: Angle) -> Merged:
        t = tile.at(self.t)
        straight = is_straight(found, self.dot_threshold)
        x, y = slerp_factors(
            found.dot,
            found.norm_a,
            found.norm_b,
            t,
            threshold=self.dot_threshold,
            geometric=self.norm == "geometric",
        )
        about = {"t": t, "cosine": found.cosine, "path": "straight" if straight else "spherical"}
        return Merged(between(tile.models, x, y), about=about)


def is_straight(found: Angle, threshold: float) -> bool:
    """Whether the way between two tensors is straight: one is zero, or their directions agree or oppose."""
    return found.norm_a == 0 or found.norm_b == 0 or abs(found.cosine) > threshold


def between(models: Tensor, x: float, y: float) -> Tensor:
    """x a + y b of (2, ...) float32; at the ends the very bits of a or b."""
    if (x, y) in ((1, 0), (0, 1)):
        return models[int(y)]
    return lincomb(models, [x, y])


def slerp(a: Tensor, b: Tensor, t: float, *, norm: str = "raw", dot_threshold: float = 0.9995) -> Tensor:
    """Two whole tensors of one shape, a at t = 0 and b at t = 1; float32, for tensors in memory."""
    u, v = a.double().flatten(), b.double().flatten()
    x, y = slerp_factors(
        float(u @ v), float(u.norm()), float(v.norm()), t, threshold=dot_threshold, geometric=norm == "geometric"
    )
    return between(torch.stack([a.float(), b.float()]), x, y)


def same(base: Source, model: Source) -> bool:
    """Whether two sources are one model: the same folder, or the same content."""
    if base.folder is not None and model.folder is not None and base.folder.resolve() == model.folder.resolve():
        return type(base) is type(model)
    return base.infos == model.infos and base.digest() == model.digest()
