"""LiNeS: scale what tuning changed by depth, little in the first blocks and fully in the last.

Of a change tau (one model's difference to the base, or a merged one), in block l = 0 .. L-1:

    theta = theta0 + (alpha + beta l/(L-1)) tau

Shallow blocks hold general features: what tuning changed there costs much of what the base could do and gives little to
the task. With one model (`alpha` 0.1, `beta` 1 - alpha) most forgetting of a finished tuning is undone, without data;
the last block keeps all of its change. With several models tau is their sum, or what another merge makes of them
(`inner`, at scale 1): then `alpha` is by default

    alpha = |sum_k tau_k|_1 / (N |tau|_1)        over all weights; 1/N for the plain sum, 1 for the mean

and only `beta` is to be searched, as one would search the scale that it replaces. No other scale is applied.

Tensors outside the blocks get alpha, as in the authors' code; `outside: depth` gives alpha + beta to those that follow
the blocks (final norm, head). By names, embeddings and positions come before the blocks, all else after them.
Differences to the authors' code: a tensor's block is that of the topology, not the first `.i.` in its name (which takes
`.mlp.0.` for block 0); stacks beside each other (encoder and decoder) run from their own first to their own last block.
An expert has the depth of its block.

When not to use it: if the tuning is to be kept as it is; on networks of a few layers a tuned uniform scale does as well
(the proof on digits shows no more than 0.01 between them).

Wang et al. 2025, "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging" (ICLR).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, FiniteFloat, SerializeAsAny, WithJsonSchema
from torch import Tensor

from luthier.errors import InputError
from luthier.findings import Finding
from luthier.merge.base import Merge, Merged, Reach, Shape, Tile, Tiles
from luthier.merge.knobs import constant
from luthier.merge.lineup import Lineup, MergedSource, Step
from luthier.merge.sources import Source
from luthier.methods import Method, build, find
from luthier.weights.algebra import lincomb, moved
from luthier.weights.depth import Depth, DepthOf

_BEFORE = ("emb", "wte", "wpe", "pos_", "position", "patch", "cls_token", "class_token", "ln_pre", "pre_layernorm")


def _unscaled(given: Any) -> Any:
    """The inner merge; its scale is 1 if none is given, and must be."""
    if given is None:
        return None
    if isinstance(given, str):
        given = {"method": given}
    if isinstance(given, Mapping) and isinstance(given.get("method"), str) and "scale" not in given:
        try:
            takes = find("merge", given["method"]).model_fields
        except InputError as error:
            raise ValueError(str(error).rstrip(".")) from None
        given = dict(given) | ({"scale": 1.0} if "scale" in takes else {})
    inner = build("merge", given)
    if not isinstance(inner, Merge):
        raise ValueError(f"{inner.method} runs the models and cannot be an inner merge")
    if constant(getattr(inner, "scale", 1.0)) != 1:
        raise ValueError(f"{inner.method} has a scale of its own; set its scale to 1, lines does the scaling")
    return inner


_SCHEMA = {"type": "object", "properties": {"method": {"type": "string"}}, "required": ["method"], "x-room": "merge"}
Inner = SerializeAsAny[
    Annotated[Method | None, BeforeValidator(_unscaled), WithJsonSchema({"anyOf": [_SCHEMA, {"type": "null"}]})]
]


class Lines(Merge):
    """Scale a change linearly with depth."""

    method: Literal["lines"] = "lines"
    paper: ClassVar[int | None] = 5
    after_survey: ClassVar[frozenset[str]] = frozenset({"beta", "outside", "num_layers"})
    alpha: FiniteFloat | None = None
    beta: FiniteFloat | None = None
    inner: Inner = None
    outside: Literal["alpha", "depth"] = "alpha"
    num_layers: Literal["auto"] | Annotated[int, Field(ge=2)] = "auto"

    @property
    def reach(self) -> Reach:
        return "model" if self.inner is not None and self.alpha is None else "tile"

    @property
    def passes(self) -> int:
        own = 1 if self.reach == "model" else 0
        return own + (self.inner.passes if isinstance(self.inner, Merge) else 0)

    def arrange(self, base: Source | None, models: Sequence[Source]) -> tuple[Source | None, list[Source]]:
        """With an inner merge its outcome comes last, as one more model."""
        if not isinstance(self.inner, Merge) or base is None:
            return base, list(models)
        frame, arranged = self.inner.arrange(base if self.inner.needs_base else None, models)
        step = Step(self.inner, Lineup(frame, arranged))
        return base, [*models, MergedSource(step, f"{self.inner.method} of the models")]

    def check(self, shape: Shape) -> None:
        if self._originals(shape.models) > 1 and self.beta is None:
            raise InputError(
                "several models are merged, and there is no beta",
                where="beta",
                fix="set it, from 0.1 to 1.0 for a sum, to 1.5 for ties",
            )
        for name in shape.names:
            depth = shape.depth_of(name)
            if depth is not None:
                self._depth(name, depth)

    def survey(self, tiles: Tiles) -> float:
        """Alpha, where it has to be measured."""
        models = next(iter(tiles())).count
        if self._originals(models) == 1:
            return self._alpha(models)
        return lines_alpha((tile.deltas[:-1], tile.deltas[-1]) for tile in tiles())

    def combine(self, tile: Tile, found: float | None) -> Merged:
        alpha = self._alpha(tile.count) if found is None else found
        beta = 1 - alpha if self.beta is None else self.beta
        depth = self._depth(tile.name, tile.depth) if tile.depth is not None else None
        scale = scale_at(tile.name, depth, alpha, beta, self.outside)
        used = tile.deltas if scale else torch.zeros_like(tile.deltas)
        if scale == 1 and len(tile.models) == 1:
            return Merged(tile.models[0], used, {"scale": scale})
        tau = tile.deltas[-1] if self.inner is not None else lincomb(tile.deltas, [1.0] * len(tile.deltas))
        return Merged(moved(tile.base, scale * tau), used, {"scale": scale})

    def noticed(self, lineup: Lineup) -> list[Finding]:
        if any(lineup.depth_of(name) for name in lineup.names):
            return []
        text = "no tensor stands in a block, so all changes are scaled by alpha alone"
        return [Finding(level="warn", code="merge.no_blocks", message=text)]

    def notes(self, found: float) -> dict[str, Any]:
        return {"alpha": found}

    def _originals(self, models: int) -> int:
        return models - 1 if self.inner is not None else models

    def _alpha(self, models: int) -> float:
        """Where nothing has to be measured: it is given, or one model's default, or the sum's 1/N."""
        count = self._originals(models)
        return self.alpha if self.alpha is not None else 0.1 if count == 1 else 1 / count

    def _depth(self, name: str, depth: Depth) -> Depth:
        count = depth.count if self.num_layers == "auto" else self.num_layers
        if count < 2:
            raise InputError(f"{name} stands in a stack of {count} block, which has no slope", fix="use a plain scale")
        if depth.index >= count:
            raise InputError(f"{name} stands in block {depth.index}", where=f"num_layers {count}", fix="set it higher")
        return Depth(depth.index, count)


def scale_at(
    name: str, depth: Depth | None, alpha: float, beta: float, outside: Literal["alpha", "depth"] = "alpha"
) -> float:
    """The factor of one tensor: from alpha in the first block to alpha + beta in the last."""
    if depth is not None:
        return alpha + beta * depth.share
    if outside == "depth" and not any(word in name.lower() for word in _BEFORE):
        return alpha + beta
    return alpha


def layer_scale(
    tau: Mapping[str, Tensor],
    alpha: float,
    beta: float,
    layer_of: DepthOf,
    outside: Literal["alpha", "depth"] = "alpha",
) -> dict[str, Tensor]:
    """Changes by name, each times its factor; new tensors of the same types."""
    return {name: change * scale_at(name, layer_of(name), alpha, beta, outside) for name, change in tau.items()}


def lines_alpha(tiles: Iterable[tuple[Tensor, Tensor]]) -> float:
    """|sum of the N changes|_1 / (N |merged|_1), from pairs of ((N, ...) changes, (...) merged change).

    The pairs are tensors or tiles of them; sums are taken in float64. Raises `InputError` if the merged change is 0.
    """
    together = merged = 0.0
    count = 1
    for changes, change in tiles:
        count = len(changes)
        together += float(changes.sum(0).abs().sum(dtype=torch.float64))
        merged += float(change.abs().sum(dtype=torch.float64))
    if merged == 0:
        raise InputError("the inner merge changes nothing, so alpha cannot be told from its size", fix="set alpha")
    return together / (count * merged)
