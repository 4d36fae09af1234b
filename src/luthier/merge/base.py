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

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from numpy.typing import NDArray

from luthier.findings import Finding
from luthier.later import torch
from luthier.merge.knobs import Knob, value_of
from luthier.methods import Method
from luthier.weights.ahead import ahead
from luthier.weights.depth import Depth, DepthOf
from luthier.weights.stored import Differences, Stored, together

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.merge.lineup import Lineup
    from luthier.merge.report import Counts
    from luthier.merge.sources import Source

T = TypeVar("T")
Reach = Literal["tile", "tensor", "model"]
Data = Iterable[Any] | Mapping[str, Iterable[Any]]
Score = float | Mapping[str, float]


class once:
    """A property that is computed when it is first asked for, and kept.

    Unlike `functools.cached_property`, which before Python 3.12 computes under one lock for all objects of a class, so
    that tiles could neither be computed side by side nor inside of each other. Asked for on two threads at once, it may
    be computed twice, to the same value.
    """

    def __init__(self, compute: Callable[[Any], Any]):
        self._compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        value = owner.__dict__[self._name] = self._compute(owner)
        return value


class Rows:
    """The same rows of one tensor in one model: `values` (rows, columns) float32, and their `delta` to the base.

    Args:
        change: the difference to the base, where it is known by itself.
        stored: where the rows lie as they are, if they do.
    """

    def __init__(
        self, values: Callable[[], Tensor], change: Callable[[], Tensor] | None = None, stored: Stored | None = None
    ):
        self._values, self._change, self.stored = values, change, stored

    @once
    def values(self) -> Tensor:
        return self._values()

    def delta(self, base: Tensor, out: Tensor) -> None:
        """values - base into `out`; of an adapter the product of its factors, which is not rounded through the sum."""
        if self._change is not None:
            out.copy_(self._change())
        else:
            torch.sub(self.values, base, out=out)


@dataclass(frozen=True)
class Tile:
    """Rows of one tensor, of the base and of all K models.

    A tensor is seen as a matrix (rows, columns): its last axis is the columns; a vector is one row; a single number is
    one by one. A tile holds whole rows.

    Attributes:
        name: of the tensor.
        place: of the tile's first element, counted over all mergeable tensors in the order of the walk.
        shape: of the whole tensor.
        region: of the tensor, by the model's topology where there is one, else by its name (`embedding`, `head`, ...).
    """

    name: str
    place: int
    shape: tuple[int, ...]
    _depth_of: DepthOf = field(repr=False)
    _base: Rows | None = field(repr=False)
    _models: Sequence[Rows] = field(repr=False)
    _region: Callable[[str], str] = field(repr=False, default=lambda name: "other")

    @property
    def region(self) -> str:
        return self._region(self.name)

    @property
    def depth(self) -> Depth | None:
        """Where the tensor stands among the blocks; None outside."""
        return self._depth_of(self.name)

    @property
    def size(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def elements(self) -> int:
        """Elements of this tile."""
        return next(rows.values for rows in (self._base, *self._models) if rows is not None).numel()

    @property
    def count(self) -> int:
        """K, how many models besides the base."""
        return len(self._models)

    @once
    def base(self) -> Tensor:
        """(rows, columns) float32; of a merge without a base an error of the caller."""
        assert self._base is not None, "this merge has no base"
        return self._base.values

    @once
    def models(self) -> Tensor:
        """(K, rows, columns) float32."""
        return torch.stack([rows.values for rows in self._models])

    @once
    def deltas(self) -> Tensor:
        """(K, rows, columns) float32: models - base."""
        found = torch.empty(len(self._models), *self.base.shape)
        for rows, out in zip(self._models, found, strict=True):
            rows.delta(self.base, out)
        return found

    @property
    def differences(self) -> Callable[[], Tensor]:
        """What computes `deltas`; of rows of files, ranks are found among them without that."""
        sides = self._stored
        return Differences(sides, lambda: self.deltas) if sides and self._base else lambda: self.deltas

    @property
    def _stored(self) -> list[Stored]:
        """The rows of all sides as they lie in files; none unless all do."""
        sides = [rows.stored for rows in (self._base, *self._models) if rows is not None]
        return [] if None in sides else sides  # type: ignore[return-value]

    @once
    def stored(self) -> NDArray[Any] | None:
        """(S, n), rows of the base, if there is one, and of each model, for a compiled pass; None if not of files."""
        return together(self._stored) if self._stored else None

    def sides(self) -> list[Tensor]:
        """The rows of the base, if there is one, and of each model."""
        return [rows.values for rows in (self._base, *self._models) if rows is not None]

    def at(self, setting: Knob) -> float:
        """The number that a setting means for this tensor."""
        return setting if isinstance(setting, float) else value_of(setting, self.name, self.depth)


@dataclass(frozen=True)
class Tiles:
    """Tiles that can be gone through again and again: each call is a pass over all models.

    Attributes:
        elements: of all tiles together.
        concurrent: whether tiles may be computed on several threads at once.
    """

    elements: int
    concurrent: bool
    _walk: Callable[[], Iterator[Tile]]

    def __call__(self) -> Iterator[Tile]:
        return self._walk()

    def each(self, work: Callable[[Tile], T]) -> Iterator[T]:
        """`work(tile)` for each tile in order, on all cores where the models allow it."""
        return ahead(self(), work) if self.concurrent else map(work, self())

    def numbers(self, of: Callable[[Tile], Tensor]) -> Iterator[tuple[int, Tensor | Callable[[], Tensor]]]:
        """What `luthier.weights.ranks` walks over: each tile's place, and `of(tile)`, computed when it is wanted."""
        for tile in self():
            yield tile.place, partial(of, tile) if self.concurrent else of(tile)

    def differences(self) -> Iterator[tuple[int, Tensor | Callable[[], Tensor]]]:
        """The same of the models' differences to the base, which are not computed where a compiled pass will do."""
        for tile in self():
            yield tile.place, tile.differences if self.concurrent else tile.deltas


@dataclass(frozen=True)
class Merged:
    """The answer for one tile.

    Attributes:
        values: (rows, columns) float32, rounded by the caller to the type of the tensor.
        used: (K, rows, columns): what of each model's difference went in, 0 where nothing did; for the report (share
            kept, share of places where signs conflict). None if the method works on models and not on differences.
        about: what the report says of this tensor besides: numbers (given by block too) and words (counted over all
            tensors); the same for all its tiles.
    """

    values: Tensor
    used: Tensor | None = None
    about: Mapping[str, float | str] = field(default_factory=dict)


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


ScoreOf = Callable[["Merge", Sequence[int]], float]
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
        per_model: settings that may be a list with one number for each model; a search varies each by itself.
        after_survey: settings that the survey does not look at, so that a search over them surveys once.
        own_vocabulary: whether models with other tokens are its own business (in `arrange`), so that they are neither
            refused nor mapped before.
    """

    room: ClassVar[str] = "merge"
    needs_base: ClassVar[bool] = True
    models_allowed: ClassVar[tuple[int, int | None]] = (1, None)
    own_vocabulary: ClassVar[bool] = False
    per_model: ClassVar[frozenset[str]] = frozenset()
    after_survey: ClassVar[frozenset[str]] = frozenset()

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

    def search(self, count: int, score: ScoreOf) -> Choice:
        """Which merge of which of `count` models to make; each call of `score` makes one on trial and evaluates it."""
        raise NotImplementedError

    def arrange(self, base: Source | None, models: Sequence[Source]) -> tuple[Source | None, list[Source]]:
        """The base and the models as this merge wants them: in another order, padded, with one more. Called before
        they are lined up, and after their vocabularies are brought together."""
        return base, list(models)

    def check(self, shape: Shape) -> None:
        """Raise `InputError` if the settings do not fit these models."""

    def survey(self, tiles: Tiles) -> Any:
        """What `combine` must know of all `tiles`; each call of `tiles` is a pass."""
        return None

    def combine(self, tile: Tile, found: Any) -> Merged:
        """The merged rows, from a tile and what the survey found. Must not change the tile's tensors."""
        raise NotImplementedError

    def fused(self, tile: Tile, found: Any) -> tuple[Counts, NDArray[Any]] | None:
        """What `combine` gives, to the last bit, in one compiled pass over rows of files (see `merge.fused`): what the
        report counts, and (n,) as `Tile.stored` has them. None where there is no such pass, or one is not finite."""
        return None

    def other_files(self, lineup: Lineup) -> list[Path]:
        """Folders whose config, tokenizer and other files go with the outcome; a later one's replace an earlier's."""
        return [lineup.frame.folder] if lineup.frame.folder is not None else []

    def amend(self, lineup: Lineup, folder: Path) -> None:
        """Change what was copied into `folder`, which has not its final name yet."""

    def noticed(self, lineup: Lineup) -> list[Finding]:
        """What is noticed of these models by their names, shapes and configs."""
        return []

    def notes(self, found: Any) -> dict[str, Any]:
        """What of the survey belongs into the report (over `model`), json-able."""
        return {}

    def findings(self, found: Any, models: Sequence[str]) -> list[Finding]:
        """What of the survey (over `model`) the user should be told; `models` are their labels."""
        return []


class WholeModelMerge(Method):
    """Base of the merges that run the models. Verb: `combine`."""

    room: ClassVar[str] = "merge"
    needs_base: ClassVar[bool] = False
    models_allowed: ClassVar[tuple[int, int | None]] = (1, None)
    needs_data: ClassVar[bool] = False

    def streamed(self) -> Merge | None:
        """The merge of tensors that gives the same with these settings, if no model need be run; else None.

        It is taken where folders or tensors are given, so that they may be of any size.
        """
        return None

    def combine(
        self,
        models: Sequence[nn.Module],
        *,
        base: nn.Module | None = None,
        data: Data | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        evaluate: Callable[[nn.Module], Score] | None = None,
    ) -> WholeMerged:
        """The merged model.

        Args:
            models: in evaluation mode; they are not changed.
            base: likewise, for the methods that need one.
            data: batches that can be gone through again and again (not an iterator); a batch is what `loss` takes, or
                the keyword arguments of the models. A mapping of names to such, for a method with several sets.
            loss: (model, batch) -> scalar mean loss with gradient.
            evaluate: model -> score, higher is better; or several figures by name, of which `score` decides and the
                others are kept in the report.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class WholeMerged:
    """What a whole-model merge gives: the model, and figures for `merge.json`; `files` are saved beside it by name:
    tensors (`pairs.safetensors`), or what writes a file or folder at the path that it is given (`Selection.save`);
    `records` are json-able objects, likewise (`pleas.json`)."""

    model: nn.Module
    report: dict[str, Any]
    files: dict[str, dict[str, Tensor] | Callable[[Path], object]] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
