"""Patch: the tuned values of a small region are copied into the base; everything else stays the base's.

    theta = tuned where the region is, base elsewhere           values are copied, so both come out bit for bit

The region is that of highest movement: of all candidate entries together the int(density d) with the largest
|tuned - base|, the lower place winning a tie; or one that was saved (`region: region.safetensors`), say by `graft`,
which learns it. It is the first step of grafting by itself, needs no data, and streams models of any size.

Candidates are all floating-point tensors but those that `exclude` names, by region (`embeddings`, `head`, `norms`) or
by pattern of names. What `always` names is taken from the tuned model whole, such as a new classifier.

TIES with one model, scale 1 and the same density picks the same entries where nothing is excluded; it adds the
difference, though, and so may miss the tuned value by a rounding.

When not to use it: for tunings whose change is spread evenly. The share that keeps a skill depends on how it was
tuned: SGD needs far less than AdamW (see `graft`).

Panigrahi et al. 2023, "Task-Specific Skill Localization in Fine-tuned Language Models" (the base patch of section 3).
Their threshold test is strict and takes one entry less; here it is exactly so many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import InputError
from luthier.merge.base import Merge, Merged, Reach, Tile, Tiles
from luthier.merge.candidates import entries_of, meets
from luthier.weights.ranks import Cut, top_cuts
from luthier.weights.selection import Selection


@dataclass(frozen=True)
class Found:
    """Where the region is: above a cut, or in a selection whose tensors begin at `starts`."""

    cut: Cut | None
    selection: Selection | None
    starts: dict[str, int]
    entries: int
    candidates: int


class Patch(Merge):
    """Copy a region of the tuned model into the base.

    Attributes:
        density: share of the candidate entries that is copied.
        region: file of a saved Selection to copy instead.
        exclude: tensors that stay the base's, by region or pattern.
        always: tensors that are taken from the tuned model whole.
    """

    method: Literal["patch"] = "patch"
    paper: ClassVar[int | None] = 30
    models_allowed: ClassVar[tuple[int, int | None]] = (1, 1)
    density: float = Field(default=1e-4, gt=0, le=1)
    region: str | None = None
    exclude: tuple[str, ...] = ("embeddings", "head")
    always: tuple[str, ...] = ()

    @property
    def reach(self) -> Reach:
        return "model"

    @property
    def passes(self) -> int:
        return 3 if self.region is None else 0

    def survey(self, tiles: Tiles) -> Found:
        starts: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for tile in tiles():  # reads nothing yet
            starts.setdefault(tile.name, tile.place)
            if self._candidate(tile):
                sizes[tile.name] = tile.size
        total = sum(sizes.values())
        if self.region is not None:
            selection = _held(Selection.load(self.region), sizes, self.region)
            return Found(None, selection, starts, selection.count, total)
        count = entries_of(self.density, total)
        if not any(self._candidate(tile) and bool(tile.deltas.any()) for tile in tiles()):
            raise InputError("tuned and base are equal wherever they may be patched", where="models")

        def walk() -> Iterator[tuple[int, Tensor]]:
            return ((tile.place, tile.deltas.abs()) for tile in tiles() if self._candidate(tile))

        return Found(top_cuts(walk, [count])[0][0], None, starts, count, total)

    def combine(self, tile: Tile, found: Found) -> Merged:
        mask = self._mask(tile, found)
        tuned = tile.models[0]
        return Merged(torch.where(mask, tuned, tile.base), torch.where(mask, tile.deltas, 0.0))

    def notes(self, found: Found) -> dict[str, Any]:
        told: dict[str, Any] = {"entries": found.entries, "candidates": found.candidates}
        return told | ({"threshold": found.cut.value} if found.cut is not None else {})

    def _candidate(self, tile: Tile) -> bool:
        return not meets(tile.name, tile.region, (*self.exclude, *self.always))

    def _mask(self, tile: Tile, found: Found) -> Tensor:
        """Bool, like the tile's base: what of it is the tuned model's."""
        shape = tile.base.shape
        if meets(tile.name, tile.region, self.always):
            return torch.ones(shape, dtype=torch.bool)
        if not self._candidate(tile):
            return torch.zeros(shape, dtype=torch.bool)
        if found.cut is not None:
            return found.cut.above(tile.deltas[0].abs(), tile.place)
        assert found.selection is not None
        if tile.name not in found.selection:
            return torch.zeros(shape, dtype=torch.bool)
        start = tile.place - found.starts[tile.name]
        return found.selection.part(tile.name, start, start + tile.base.numel()).view(shape)


def _held(selection: Selection, sizes: dict[str, int], where: str) -> Selection:
    """`selection` if all that it selects is in candidates of these sizes; else `InputError`."""
    for name, count in selection.counts().items():
        if count and name not in sizes:
            raise InputError(f"selects entries of {name}, which is no candidate", where=where, fix="mend exclude")
        if name in sizes and selection.elements_of(name) != sizes[name]:
            what = f"{name} has {selection.elements_of(name)} entries there and {sizes[name]} in the models"
            raise InputError(what, where=where)
    return selection
