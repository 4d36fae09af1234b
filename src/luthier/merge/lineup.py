"""Models lined up tensor by tensor: which names they share, which are copied, and tiles of them.

`Lineup` refuses what does not belong together and names it: tensors that only some hold, shapes that differ, integer
tensors that differ. A tied tensor that only some files spell out twice is counted once. `Step` is a merge on a lineup;
`MergedSource` makes a step a model of the next one, so that a chain of merges is never written in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from luthier.errors import InputError
from luthier.later import torch
from luthier.merge.base import Merge, Merged, Rows, Shape, Tile, Tiles
from luthier.merge.depth import depth_of, region_of
from luthier.merge.sources import Source, blocks_of, config_of, matrix_shape
from luthier.weights.ahead import ahead
from luthier.weights.depth import DepthOf
from luthier.weights.hashing import tensor_hash
from luthier.weights.info import Info, some

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R")


class Lineup:
    """A base (or none) and K models of one architecture.

    Attributes:
        frame: the source whose types, config and other files the outcome takes: the base, else the first model.
        names: of the tensors that are merged, sorted.
        copied: of those that are taken from the frame as they are: integers, booleans, and tensors without elements.

    Raises `InputError` that names what does not fit.
    """

    def __init__(self, base: Source | None, models: Sequence[Source], depths: DepthOf | None = None):
        self.base, self.models = base, tuple(models)
        self.frame: Source = base if base is not None else models[0]
        everyone = [*([base] if base is not None else []), *models]
        repeated = {source.label: _repeats(source) for source in everyone}
        sides = {
            id(source): {n: i for n, i in source.infos.items() if n not in repeated[source.label]}
            for source in everyone
        }
        self.infos = sides[id(self.frame)]
        for source in everyone:
            _comparable(self.frame, self.infos, source, sides[id(source)])
        self.repeats = repeated[self.frame.label]
        merged = [n for n, info in self.infos.items() if info.floating and info.elements]
        odd = [n for n in merged if self.infos[n].itemsize == 1]
        if odd:
            raise InputError(
                f"{len(odd)} tensors are quantised ({some(odd)})", where=self.frame.label, fix="dequantise them first"
            )
        if not merged:
            raise InputError("holds no tensors of real numbers, so there is nothing to merge", where=self.frame.label)
        self.names = sorted(merged)
        self.copied = sorted(set(self.infos) - set(self.names))
        for source in everyone:
            different = [n for n in self.copied if not torch.equal(self.frame.whole(n), source.whole(n))]
            if different:
                what = f"{len(different)} tensors of whole numbers differ from those of {self.frame.label}"
                raise InputError(f"{what} ({some(different)})", where=source.label)
        self._depths = depths
        self.places: dict[str, int] = {}
        self.elements = 0
        for name in self.names:
            self.places[name] = self.elements
            self.elements += self.infos[name].elements

    @property
    def concurrent(self) -> bool:
        """Whether rows of all its sources may be computed on several threads at once."""
        everyone = (source for source in (self.base, *self.models) if source is not None)
        return all(getattr(source, "concurrent", False) for source in everyone)

    @cached_property
    def depth_of(self) -> DepthOf:
        """Depth of a tensor; the topology is only found when somebody asks, since it takes seconds."""
        return self._depths or depth_of(self.frame.folder, self.names)

    @property
    def shape(self) -> Shape:
        return Shape(len(self.models), lambda name: self.depth_of(name), self.names)

    @cached_property
    def region_of(self) -> Callable[[str], str]:
        """Region of a tensor by name."""
        return region_of(self.frame.folder, self.names)

    @cached_property
    def bytes(self) -> int:
        """What a pass over the base and all models reads."""
        everyone = [*([self.base] if self.base is not None else []), *self.models]
        return sum(source.infos[name].bytes for source in everyone for name in self.names)

    def tile(self, name: str, start: int, stop: int) -> Tile:
        """Rows `start` to `stop` of one tensor."""
        info = self.infos[name]
        base = self.base.rows(name, start, stop) if self.base is not None else None
        place = self.places[name] + start * matrix_shape(info.shape)[1]
        models = [model.rows(name, start, stop) for model in self.models]
        return Tile(
            name,
            place,
            info.shape,
            lambda name: self.depth_of(name),
            base,
            models,
            lambda name: self.region_of(name),
        )

    def tiles(self, names: Iterable[str] | None = None) -> Iterator[Tile]:
        """All tiles of `names` (default: all that are merged), in order."""
        for name in self.names if names is None else names:
            for start, stop in blocks_of(self.infos[name].shape):
                yield self.tile(name, start, stop)


class Step:
    """One merge on one lineup: its survey is made when first needed, then any rows can be had.

    Args:
        keep: keep what the surveys of all tensors find, for `again`; else only that of the last tensor.
    """

    def __init__(self, method: Merge, lineup: Lineup, *, keep: bool = False):
        self.method, self.lineup, self.keep = method, lineup, keep
        least, most = method.models_allowed
        count = len(lineup.models)
        if count < least or (most is not None and count > most):
            wanted = str(least) if most == least else f"{least} or more" if most is None else f"{least} to {most}"
            raise InputError(f"{method.method} takes {wanted} models besides a base, got {count}", where="models")
        if method.needs_base and lineup.base is None:
            raise InputError(f"{method.method} merges differences to a base, and none is given", fix="give --base")
        if method.searches:
            raise InputError(
                f"{method.method} with these settings searches, and this merge is one step of several",
                fix="make that merge first and name its outcome here",
            )
        method.check(lineup.shape)
        self._found: dict[str, Any] = {}  # by tensor; of a survey over the whole model under ""

    def again(self, method: Merge) -> Step:
        """The step with other settings, and with what was found if the survey does not look at those that differ."""
        step = Step(method, self.lineup, keep=self.keep)
        ours, theirs = self.method.model_dump(), method.model_dump()
        if {name for name in ours | theirs if ours.get(name) != theirs.get(name)} <= method.after_survey:
            step._found = self._found
        return step

    @property
    def found(self) -> Any:
        """What the survey of the whole model found."""
        return self._survey("", self.lineup.names) if self.method.reach == "model" else None

    def found_of(self, name: str) -> Any:
        """What `combine` gets for one tensor."""
        if self.method.reach == "tensor":
            return self._survey(name, [name])
        return self.found

    def _survey(self, key: str, names: Sequence[str]) -> Any:
        known = self._found
        if key in known:
            return known[key]
        elements = sum(self.lineup.infos[name].elements for name in names)
        found = self.method.survey(Tiles(elements, self.lineup.concurrent, lambda: self.lineup.tiles(names)))
        known[key] = found
        for other in list(known) if not self.keep else ():  # tensors may be surveyed at once, each on its thread
            if other != key:
                known.pop(other, None)
        return found

    def merged(self, name: str, start: int, stop: int) -> Merged:
        """The outcome for these rows, float32."""
        return self.method.combine(self.lineup.tile(name, start, stop), self.found_of(name))

    def each(self, names: Sequence[str], work: Callable[[Tile, Any], R]) -> Iterator[R]:
        """`work` of each tile of these tensors and what the survey found, in order; on all cores where the models
        allow it. Several names are for a method that does not survey tensor by tensor."""
        found = self.found_of(names[0])

        def done(tile: Tile) -> R:
            return work(tile, found)

        tiles = self.lineup.tiles(names)
        return ahead(tiles, done) if self.lineup.concurrent else map(done, tiles)


class MergedSource:
    """The outcome of a step as a model, in float32, computed when it is asked for."""

    def __init__(self, step: Step, label: str):
        self.step, self.label, self.folder = step, label, step.lineup.frame.folder
        self.infos: Mapping[str, Info] = step.lineup.infos

    def rows(self, name: str, start: int, stop: int) -> Rows:
        return Rows(lambda: self.step.merged(name, start, stop).values)

    def whole(self, name: str) -> Tensor:
        return self.step.lineup.frame.whole(name)

    def digest(self) -> str:
        everyone = [self.step.lineup.base, *self.step.lineup.models]
        return "+".join(source.digest()[:8] for source in everyone if source is not None)


def _repeats(source: Source) -> dict[str, str]:
    """Names of tensors that are another one once more, by the config's word that they are tied and their own content:
    name -> the name that stays."""
    config = config_of(source)
    if not config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", True)):
        return {}
    if not config and source.folder is None:
        return {}
    by_info: dict[Info, list[str]] = {}
    for name, info in source.infos.items():
        if len(info.shape) == 2 and info.shape[0] == config.get("vocab_size", -1):
            by_info.setdefault(info, []).append(name)
    found: dict[str, str] = {}
    for names in by_info.values():
        if len(names) < 2:
            continue
        kept: dict[str, str] = {}
        # An embedding stays before a head, whatever the order of the alphabet.
        for name in sorted(names, key=lambda n: ("emb" not in n and "wte" not in n, n)):
            digest = tensor_hash(source.whole(name))
            if digest in kept:
                found[name] = kept[digest]
            kept.setdefault(digest, name)
    return found


def _comparable(frame: Source, ours: dict[str, Info], source: Source, theirs: dict[str, Info]) -> None:
    """`InputError` with the names, if two sources do not hold the same tensors."""
    if ours.keys() != theirs.keys():
        sides = ((frame.label, ours.keys() - theirs.keys()), (source.label, theirs.keys() - ours.keys()))
        said = "; ".join(f"only in {label}: {some(sorted(names))}" for label, names in sides if names)
        raise InputError(
            f"holds other tensors than {frame.label} ({said})",
            where=source.label,
            fix="merge models of one architecture",
        )
    other = [
        f"{name} {list(info.shape)} and {list(theirs[name].shape)}"
        for name, info in ours.items()
        if info.shape != theirs[name].shape
    ]
    if other:
        fix = "models of one architecture are needed; where only the vocabulary differs, vocabulary: map"
        raise InputError(
            f"{len(other)} tensors have another shape than in {frame.label} ({some(other)})",
            where=source.label,
            fix=fix,
        )
    kinds = [
        f"{name} {info.kind} and {theirs[name].kind}"
        for name, info in ours.items()
        if info.floating != theirs[name].floating
    ]
    if kinds:
        raise InputError(f"{len(kinds)} tensors are of another kind ({some(kinds)})", where=source.label)
