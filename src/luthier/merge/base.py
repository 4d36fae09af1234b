"""The contract of a merge: models of one shape go in as tiles, one model comes out.

A merge never sees a model. It is asked tile by tile: a tile is a few rows of one tensor, with the same rows of all
models, as float32. So memory does not depend on the size of the model or of its largest tensor. What needs to be known
of the whole model (a threshold over all weights) or of a whole tensor (a norm), the merge finds out beforehand:

    class Ties(Merge):
        def survey(self, tiles):            # each loop over tiles() is a pass over all models
            return thresholds(tiles)
        def combine(self, tile, found):     # the answer for one tile; stateless, so tiles may come in any order
            return Merged(moved(tile.base, change), trimmed)

`reach` says over what the survey goes: `tile` (none is needed), `tensor` (the tiles of one tensor, right before they
are combined), `model`. Because `combine` is stateless and the survey repeatable, a merge can itself be one of the
models of another, without ever being written (see `sources.MergedSource`).

A merge that chooses by a score (which models, which scale) sets `searches` and tells in `search` what it wants tried;
what it settles on is a merge without a search. So looking for the best one streams like any other merge, and needs no
more of a model than that somebody can score it.

`WholeModelMerge` is for the few that must run the models: they get modules, data and callables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.merge.knobs import Knob, value_of
from luthier.methods import Method
from luthier.weights.depth import Depth, DepthOf

if TYPE_CHECKING:
    from luthier.merge.lineup import Lineup
    from luthier.merge.sources import Source

Reach = Literal["tile", "tensor", "model"]


class Rows:
    """The same rows of one tensor in one model: `values` (rows, columns) float32, and their `delta` to the base."""

    def __init__(self, values: Callable[[], Tensor], delta: Callable[[Tensor], Tensor] | None = None):
        self._values, self._delta = values, delta

    @cached_property
    def values(self) -> Tensor:
        return self._values()

    def delta(self, base: Tensor) -> Tensor:
        """values - base; of an adapter the product of its factors itself, which is not rounded through the sum."""
        return self._delta(base) if self._delta is not None else self.values - base


@dataclass(frozen=True)
class Tile:
    """Rows of one tensor, of the base and of all K models.

    A tensor is seen as a matrix (rows, columns): its last axis is the columns; a vector is one row; a single number is
    one by one. A tile holds whole rows.

    Attributes:
        name: of the tensor.
        place: of the tile's first element, counted over all mergeable tensors in the order of the walk.
        depth: of the tensor among the blocks; None outside.
        size: elements of the whole tensor.
    """

    name: str
    place: int
    depth: Depth | None
    size: int
    _base: Rows | None = field(repr=False)
    _models: Sequence[Rows] = field(repr=False)

    @cached_property
    def base(self) -> Tensor:
        """(rows, columns) float32; of a merge without a base an error of the caller."""
        assert self._base is not None, "this merge has no base"
        return self._base.values

    @cached_property
    def models(self) -> Tensor:
        """(K, rows, columns) float32."""
        return torch.stack([rows.values for rows in self._models])

    @cached_property
    def deltas(self) -> Tensor:
        """(K, rows, columns) float32: models - base."""
        return torch.stack([rows.delta(self.base) for rows in self._models])

    def sides(self) -> list[Tensor]:
        """The rows of the base, if there is one, and of each model."""
        return [rows.values for rows in (self._base, *self._models) if rows is not None]

    def at(self, setting: Knob) -> float:
        """The number that a setting means for this tensor."""
        return value_of(setting, self.name, self.depth)


Tiles = Callable[[], Iterable[Tile]]


@dataclass(frozen=True)
class Merged:
    """The answer for one tile.

    Attributes:
        values: (rows, columns) float32, rounded by the caller to the type of the tensor.
        used: (K, rows, columns): what of each model's difference went in, 0 where nothing did; for the report (share
            kept, share of places where signs conflict). None if the method works on models and not on differences.
    """

    values: Tensor
    used: Tensor | None = None


@dataclass(frozen=True)
class Shape:
    """What a merge may know before its first pass.

    Attributes:
        models: K, how many models besides the base.
        depth_of: depth of a tensor by name.
        names: of all mergeable tensors, in the order of the walk.
    """

    models: int
    depth_of: DepthOf
    names: Sequence[str]


Score = Callable[["Merge", Sequence[int]], float]
"""The score of what a merge makes of some of the models, by their numbers in the order given; never not-a-number."""


@dataclass(frozen=True)
class Choice:
    """What a search settled on.

    Attributes:
        method: the merge to make; it does not search.
        models: of which of the models, by their numbers, in this order.
        log: of the search, json-able, for `merge.json`.
    """

    method: Merge
    models: Sequence[int]
    log: dict[str, Any]


class Merge(Method):
    """Base of all merges that go tensor by tensor. Verb: `combine`.

    Attributes:
        needs_base: whether models are seen as differences to a base.
        models_allowed: least and most models besides the base; None is any number.
        figures: names of settings that a search may vary, such as `scale`.
    """

    room: ClassVar[str] = "merge"
    needs_base: ClassVar[bool] = True
    models_allowed: ClassVar[tuple[int, int | None]] = (1, None)

    @property
    def reach(self) -> Reach:
        return "tile"

    @property
    def passes(self) -> int:
        """How often the survey goes over all models at most; for the plan and the progress bar."""
        return 0

    @property
    def searches(self) -> bool:
        """Whether `search` must settle the settings or the models before anything can be merged."""
        return False

    def search(self, count: int, score: Score) -> Choice:
        """Which merge of which of `count` models to make; each call of `score` makes one on trial and evaluates it."""
        raise NotImplementedError

    def arrange(self, base: Source | None, models: Sequence[Source]) -> tuple[Source | None, list[Source]]:
        """The base and the models as this merge wants them: in another order, padded, with one more. Called first."""
        return base, list(models)

    def check(self, shape: Shape) -> None:
        """Raise `InputError` if the settings do not fit these models."""

    def survey(self, tiles: Tiles) -> Any:
        """What `combine` must know of all `tiles`; each call of `tiles` is a pass."""
        return None

    def combine(self, tile: Tile, found: Any) -> Merged:
        """The merged rows, from a tile and what the survey found. Must not change the tile's tensors."""
        raise NotImplementedError

    def other_files(self, lineup: Lineup) -> list[Path]:
        """Folders whose config, tokenizer and other files go with the outcome; a later one's replace an earlier's."""
        return [lineup.frame.folder] if lineup.frame.folder is not None else []

    def notes(self, found: Any) -> dict[str, Any]:
        """What of the survey belongs into the report (over `model`), json-able."""
        return {}


class WholeModelMerge(Method):
    """Base of the merges that run the models. Verb: `combine`."""

    room: ClassVar[str] = "merge"
    needs_base: ClassVar[bool] = False
    models_allowed: ClassVar[tuple[int, int | None]] = (1, None)
    needs_data: ClassVar[bool] = False

    def combine(
        self,
        models: Sequence[nn.Module],
        *,
        base: nn.Module | None = None,
        data: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
    ) -> WholeMerged:
        """The merged model.

        Args:
            models: in evaluation mode; they are not changed.
            base: likewise, for the methods that need one.
            data: batches that can be gone through again and again (not an iterator); a batch is what `loss` takes, or
                the keyword arguments of the models.
            loss: (model, batch) -> scalar mean loss with gradient.
            evaluate: model -> score, higher is better.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class WholeMerged:
    """What a whole-model merge gives: the model, and figures for `merge.json`; `files` are tensors saved beside it
    by file name (`mask.safetensors`)."""

    model: nn.Module
    report: dict[str, Any]
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
