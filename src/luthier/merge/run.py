"""`lt.merge`: models in, one model out, whatever their size.

    lt.merge("ties", base="base", models=["a", "b"], out="merged")                     folders
    lt.merge(Ties(density=0.1), base=state, models=[state_a, state_b]).tensors         in memory

Files are read through memory maps and written tile by tile into a folder beside `out` that takes its name at the end.
With it come the base's other files (config, tokenizer), `merge.json` (settings, hashes of what went in, share kept and
sign conflicts per tensor) and `merge.svg`, its picture by depth.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from luthier.errors import InputError
from luthier.findings import Finding
from luthier.later import torch
from luthier.merge.base import Data, Merge, Merged, Score, Tile, WholeModelMerge
from luthier.merge.lineup import Lineup, Step
from luthier.merge.report import Counter, Counts, counted, draw
from luthier.merge.sources import Source, StoredSource, open_source
from luthier.merge.vocabulary import same_vocabulary
from luthier.methods import build
from luthier.models.allocator import keep_freed_memory
from luthier.models.files import write_aside
from luthier.weights.ahead import ahead, beside
from luthier.weights.algebra import finite
from luthier.weights.depth import DepthOf, depth_of_names
from luthier.weights.stored import as_tensor
from luthier.weights.writer import SHARD_BYTES, Piece, copy_others, refuse_filled, write_weights

if TYPE_CHECKING:
    from torch import Tensor

Say = Callable[[int, int], None]  # bytes read so far, of how many
Look = Callable[[Counts], None]
Vocabulary = Literal["refuse", "map"]
SMALL = 2**22  # elements of a tensor that one thread computes whole


@dataclass(frozen=True)
class MergeResult:
    """What came out.

    Attributes:
        folder: where it was written; None in memory.
        tensors: the merged tensors in memory, in the base's types; empty if they were written.
        report: what `merge.json` says.
        findings: what was noticed, such as a model that lies far from its base.
    """

    folder: Path | None
    tensors: dict[str, Tensor]
    report: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    model: Any = None


def merge(
    method: Any,
    *,
    models: Sequence[Any],
    base: Any = None,
    out: Path | str | None = None,
    data: Data | None = None,
    loss: Callable[..., Tensor] | None = None,
    evaluate: Callable[[Any], Score] | None = None,
    vocabulary: Vocabulary = "refuse",
    depth_of: DepthOf | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Say = lambda done, total: None,
) -> MergeResult:
    """Merge `models` by `method`.

    Args:
        method: a merge's name, its settings as a mapping, or the object.
        models, base: folders or files of weights, LoRA adapters, deltas, mappings of tensors, or modules.
        out: new folder; None gives tensors in memory (or, of a method that runs the models, a module).
        data, loss, evaluate: for the methods that run the models (`luthier.merge.base.WholeModelMerge`). `evaluate`
            also for those that choose by a score (`soup` with greedy); what it is handed is in `luthier.merge.trials`.
        vocabulary: what to do when tokenizers differ: refuse, or map every model's rows to the base's tokens.
        depth_of: depth of a tensor by name; by default from the model's topology, else from its names.

    Raises `InputError` for what does not fit together, with names; nothing stands at `out` then.
    """
    began = time.perf_counter()
    keep_freed_memory()
    chosen = build("merge", method)
    if out is not None:
        refuse_filled(Path(out))
    if isinstance(chosen, WholeModelMerge) and not any(isinstance(given, torch.nn.Module) for given in (base, *models)):
        chosen = chosen.streamed() or chosen
    if isinstance(chosen, WholeModelMerge):
        from luthier.merge.whole import merge_modules

        return merge_modules(chosen, models, base, out, data=data, loss=loss, evaluate=evaluate)
    assert isinstance(chosen, Merge)
    idle = [("data", data), ("loss", loss), ("evaluate", None if chosen.searches else evaluate)]
    unused = [name for name, given in idle if given is not None]
    if unused:
        raise InputError(f"{chosen.method} has no use for {', '.join(unused)}", fix="leave it out")
    about: dict[str, Any] = {}
    if chosen.searches:
        from luthier.merge.trials import settle

        frame, opened = sources_of(models, base)

        def line_up(method: Merge, some: Sequence[Source]) -> Lineup:
            return lined_up(method, some, frame, vocabulary, depth_of)

        choice = settle(chosen, models, opened, line_up, evaluate, out=out, shard_bytes=shard_bytes)
        about = {"method": chosen.model_dump(mode="json"), "search": choice.log}
        chosen, models, base = choice.method, [opened[k] for k in choice.models], frame
    step = Step(chosen, lined_up(chosen, models, base, vocabulary, depth_of))
    return write_step(step, out, began=began, shard_bytes=shard_bytes, say=say, about=about)


def sources_of(models: Sequence[Any], base: Any) -> tuple[Source | None, list[Source]]:
    """The base and the models, opened and told apart by their labels."""
    if not models:
        raise InputError("there is no model to merge", where="models")
    frame = open_source(base, None) if base is not None else None
    return frame, _told_apart([open_source(model, frame) for model in models])


def lined_up(
    method: Merge, models: Sequence[Any], base: Any, vocabulary: Vocabulary = "refuse", depth_of: DepthOf | None = None
) -> Lineup:
    """The sources of a merge, opened, checked against each other and ordered as the method wants them."""
    frame, opened = sources_of(models, base)
    if not method.own_vocabulary:
        opened = same_vocabulary(frame or opened[0], opened, vocabulary)
    frame, opened = method.arrange(frame, opened)
    return Lineup(frame, opened, depth_of)


def write_step(
    step: Step,
    out: Path | str | None,
    *,
    began: float,
    shard_bytes: int = SHARD_BYTES,
    say: Say = lambda *_: None,
    about: Mapping[str, Any] | None = None,
) -> MergeResult:
    """Make the passes of a step and write or return its outcome with its report; `about` goes over the report's own."""
    lineup, method = step.lineup, step.method
    counter = Counter([model.label for model in lineup.models], depth_of_names(lineup.names))
    total, done = lineup.bytes * (method.passes + 1), 0

    def look(counts: Counts) -> None:
        nonlocal done
        counter.add(counts)
        done += int(counts.elements * lineup.bytes / max(lineup.elements, 1))
        say(min(done, total), total)

    tensors: dict[str, Tensor] = {}
    stored = [source for source in (lineup.base, *lineup.models) if isinstance(source, StoredSource)]
    with beside(chain.from_iterable(source.hashing() for source in stored)) as hashed:
        if method.reach == "model":
            _ = step.found
            done = lineup.bytes * method.passes
            say(done, total)
        if out is None:
            tensors = merged_tensors(step, look)
            hashed.result()
            report = _report(step, counter, began, about)
        else:
            check_room(Path(out), lineup)
            with write_aside(Path(out)) as aside:
                write_merged(step, aside, look, shard_bytes=shard_bytes)
                hashed.result()
                report = _report(step, counter, began, about)
                draw(report["tensors"], aside / "merge.svg")
                (aside / "merge.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    say(total, total)
    return MergeResult(Path(out) if out is not None else None, tensors, report, _findings(step, counter))


def merged_tensors(step: Step, look: Look = lambda *_: None) -> dict[str, Tensor]:
    """The outcome of a step in memory, in the types of its frame; `look` is called with what was counted of each
    tile."""
    made = Pieces(step, step.lineup.infos, look)
    return {
        name: torch.cat([_flat(piece) for piece in made(name)]).reshape(info.shape)
        for name, info in step.lineup.infos.items()
    }


def write_merged(step: Step, folder: Path, look: Look = lambda *_: None, *, shard_bytes: int = SHARD_BYTES) -> None:
    """The outcome of a step as weights, config and tokenizer in a folder that exists."""
    made = Pieces(step, step.lineup.infos, look)
    write_weights(folder, step.lineup.infos, made, shard_bytes=shard_bytes)
    for other in step.method.other_files(step.lineup):
        copy_others(other, folder)
    step.method.amend(step.lineup, folder)


class Pieces:
    """The tensors of an outcome one after the other, each in pieces of its stored type.

    Tiles are computed side by side, a few ahead of who takes them. Where a method surveys tensor by tensor, small
    tensors are computed side by side instead, each on one thread. Called with the names in the order that was given.
    """

    def __init__(self, step: Step, names: Iterable[str], look: Look):
        self.step, self.look, self.names = step, look, list(names)
        self._coming: Iterator[list[tuple[Counts, Piece]]] = iter(())
        self._left: set[str] = set()

    def __call__(self, name: str) -> Iterator[Piece]:
        lineup = self.step.lineup
        if name not in lineup.places:
            yield lineup.frame.whole(name)
            return
        if name not in self._left:
            self._begin(name)
        self._left.remove(name)
        left = lineup.infos[name].elements
        while left:
            for counts, piece in next(self._coming):
                self.look(counts)
                yield piece
                left -= counts.elements
        if not self._left:  # the stream ends here, and its threads, not when it is collected as garbage
            next(self._coming, None)

    def _begin(self, name: str) -> None:
        """Start on the tensors from this one on, as many as can be worked on in one stream."""
        step, lineup = self.step, self.step.lineup
        coming = [n for n in self.names[self.names.index(name) :] if n in lineup.places]
        if step.method.reach != "tensor":
            self._coming = ([made] for made in step.each(coming, self._made))
        elif self._large(name):
            coming = [name]
            self._coming = ([made] for made in step.each(coming, self._made))
        else:
            coming = list(takewhile(lambda n: not self._large(n), coming))
            self._coming = ahead(coming, lambda n: list(step.each([n], self._made)))
        self._left = set(coming)

    def _large(self, name: str) -> bool:
        return not self.step.lineup.concurrent or self.step.lineup.infos[name].elements > SMALL

    def _made(self, tile: Tile, found: Any) -> tuple[Counts, Piece]:
        method, lineup = self.step.method, self.step.lineup
        info = lineup.infos[tile.name]
        fused = method.fused(tile, found)
        if fused is not None:
            counts, values = fused
            return counts, values if values.dtype == info.array else as_tensor(values).to(info.dtype)
        with torch.no_grad():
            merged = method.combine(tile, found)
            _finite(tile, merged, lineup)
            return counted(tile, merged), merged.values.to(info.dtype)


def _flat(piece: Piece) -> Tensor:
    return as_tensor(piece) if isinstance(piece, np.ndarray) else piece.reshape(-1)


def _findings(step: Step, counter: Counter) -> list[Finding]:
    found = [*step.method.noticed(step.lineup), *counter.findings()]
    if step.method.reach == "model":
        found += step.method.findings(step.found, counter.models)
    return found


def _report(step: Step, counter: Counter, began: float, about: Mapping[str, Any] | None) -> dict[str, Any]:
    lineup = step.lineup
    return {
        "method": step.method.model_dump(mode="json"),
        **(about or {}),
        "base": _told(lineup.base) if lineup.base is not None else None,
        "models": [_told(model) for model in lineup.models],
        "seconds": time.perf_counter() - began,
        "survey": step.method.notes(step.found) if step.method.reach == "model" else {},
        "findings": [finding.model_dump(mode="json") for finding in _findings(step, counter)],
        "total": counter.totals(),
        "blocks": counter.blocks(),
        "tensors": counter.rows(),
    }


def _told(source: Source) -> dict[str, str]:
    return {"name": source.label, "hash": source.digest()}


def _told_apart(sources: Sequence[Source]) -> list[Source]:
    """Sources in memory have no names; number those that share one."""
    labels = [source.label for source in sources]
    for number, source in enumerate(sources, start=1):
        if labels.count(source.label) > 1:
            source.label = f"{source.label} ({number})"
    return list(sources)


def _finite(tile: Tile, merged: Merged, lineup: Lineup) -> None:
    """`InputError` that names the model and the tensor, if anything holds infinities or not-a-numbers."""
    _finite_models(tile, lineup)
    if not finite(merged.values):
        for other in lineup.tiles():  # of which a survey may have carried it here
            _finite_models(other, lineup)
        raise InputError(f"{tile.name} comes out infinite or not a number", fix="lower scale or the weights")


def _finite_models(tile: Tile, lineup: Lineup) -> None:
    labels = [source.label for source in (lineup.base, *lineup.models) if source is not None]
    for label, values in zip(labels, tile.sides(), strict=True):
        if not finite(values):
            raise InputError(
                f"{tile.name} holds values that are infinite or not numbers", where=label, fix="mend that model first"
            )


def check_room(out: Path, lineup: Lineup) -> None:
    """`InputError` before anything is written, if the disk has not room enough."""
    needed = sum(info.bytes for info in lineup.infos.values())
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"the merged model takes {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB free",
            where=str(out),
            fix="make room, or choose another place",
        )
