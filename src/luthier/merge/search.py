"""`lt.merge_search`: try settings of a merge, judge each outcome, keep the best.

    found = lt.merge_search("ties", base=base, models=[a, b], evaluate=accuracy, grid={"scale": [0.8, 1.0, 1.2]})
    found.settings, found.score, found.trials, found.merged.tensors

`evaluate` gets what was merged (tensors by name; with `out` a folder that can be loaded) and returns a score, higher
is better. What may vary is named with values or with bounds; the rest stays as in the settings given.

    grid    values of each name, all combinations (`optimizer: random` draws some of them)
    bounds  (low, high) of each name, drawn at random or by an evolution strategy; a setting that may be a list with
            one number for each model (`Merge.per_model`: PCB's scale, the weights of TIES) is searched so

A bare list or pair means `scale`. The evolution strategy starts from the settings as given and keeps the best of four
children with normal steps, which grow by half when one is better and shrink by a fifth when none is: enough for the
ten numbers that a merge has, without gradients and without a dependency.

Where only settings differ that the survey does not look at (`Merge.after_survey`: `scale`), the models are not
surveyed again, so that a trial costs one pass. Of equal scores the earlier trial is the best. A score that is not a
number counts as the worst. The same seed gives the same trials, as long as `evaluate` gives the same scores.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from luthier.errors import InputError, did_you_mean
from luthier.merge.base import Merge
from luthier.merge.lineup import Step
from luthier.merge.run import MergeResult, Vocabulary, check_room, lined_up, merged_tensors, write_merged, write_step
from luthier.methods import build
from luthier.models.files import write_aside
from luthier.weights.depth import DepthOf
from luthier.weights.writer import SHARD_BYTES, refuse_filled

Optimizer = Literal["grid", "random", "es"]
Grid = Mapping[str, Sequence[Any]] | Sequence[Any]
Bounds = Mapping[str, Any] | tuple[float, float]
Values = dict[str, Any]
Proposals = Generator[Values, float, None]  # values to try, sent their score
TRIALS = 100  # of a search by bounds that was given no budget


@dataclass(frozen=True)
class Trial:
    """What was tried, and its score; None if that was not a number."""

    values: Values
    score: float | None


@dataclass(frozen=True)
class SearchResult:
    """The best settings with their score, all trials in their order, and the merge with the best settings."""

    settings: Merge
    score: float
    trials: list[Trial]
    merged: MergeResult


def merge_search(
    settings: Any,
    *,
    models: Sequence[Any],
    evaluate: Callable[[Any], float],
    base: Any = None,
    grid: Grid | None = None,
    bounds: Bounds | None = None,
    budget: int | None = None,
    seed: int = 0,
    optimizer: Optimizer | None = None,
    out: Path | str | None = None,
    vocabulary: Vocabulary = "refuse",
    depth_of: DepthOf | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[Trial], None] = lambda trial: None,
) -> SearchResult:
    """The settings of a merge that `evaluate` likes best.

    Args:
        settings: a merge of tensors: its name, a mapping, or the object; what is not searched stays as it is here.
        models, base, vocabulary, depth_of, shard_bytes: as for `luthier.merge.run.merge`.
        evaluate: merged tensors by name, or with `out` the path of a folder that is gone afterwards -> score.
        grid, bounds: what to vary, one of the two (see the top of this file).
        budget: most trials; by default the whole grid, or 100.
        optimizer: `grid` (the default for a grid), `random`, or `es` (the default for bounds).
        out: new folder for the best merge, whose `merge.json` tells the trials; None gives tensors in memory.
        say: is told of each trial.

    Raises `InputError` for names or values that the merge does not take, before anything is tried where that can be
    known, and if no score was a number.
    """
    began = time.perf_counter()
    chosen = build("merge", settings)
    if not isinstance(chosen, Merge):
        raise InputError(f"{chosen.method} runs the models and has no settings to search here", where="settings")
    if out is not None:
        refuse_filled(Path(out))
    step = Step(chosen, lined_up(chosen, models, base, vocabulary, depth_of), keep=True)
    proposals = _proposals(chosen, len(step.lineup.models), grid, bounds, budget, seed, optimizer)
    trials: list[Trial] = []
    best: tuple[float, Merge] | None = None
    with ExitStack() as stack:
        place = None
        if out is not None:
            check_room(Path(out), step.lineup)
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".search-", dir=Path(out).parent)))
        values = next(proposals, None)
        while values is not None:
            method = varied(chosen, values)
            step = step.again(method)
            if place is None:
                score = float(evaluate(merged_tensors(step)))
            else:
                score = float(evaluate_in(place / "trial", step, evaluate, shard_bytes))
            score = -math.inf if math.isnan(score) else score
            trials.append(Trial(values, score if math.isfinite(score) else None))
            say(trials[-1])
            if score > (best[0] if best else -math.inf):
                best = score, method
            try:
                values = proposals.send(score)
            except StopIteration:
                values = None
    if best is None:
        raise InputError(f"none of {len(trials)} trials has a score that is a number", where="evaluate")
    told = {"score": best[0], "trials": [{"values": trial.values, "score": trial.score} for trial in trials]}
    merged = write_step(step.again(best[1]), out, began=began, shard_bytes=shard_bytes, about={"search": told})
    return SearchResult(best[1], best[0], trials, merged)


def evaluate_in(folder: Path, step: Step, evaluate: Callable[[Any], float], shard_bytes: int) -> float:
    """The score of the outcome of a step, written into `folder` for as long as it takes."""
    with write_aside(folder) as aside:
        write_merged(step, aside, shard_bytes=shard_bytes)
    try:
        return evaluate(folder)
    finally:
        shutil.rmtree(folder)


def varied(method: Merge, values: Values) -> Merge:
    """The merge with other values; `InputError` if it does not take them."""
    try:
        return type(method).model_validate(method.model_dump() | values)
    except ValidationError as error:
        said = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise InputError(f"{method.method} does not take {values}: {said}", where="search") from None


def _proposals(
    method: Merge,
    models: int,
    grid: Grid | None,
    bounds: Bounds | None,
    budget: int | None,
    seed: int,
    optimizer: Optimizer | None,
) -> Proposals:
    """The proposals that the arguments of a search mean; what can be checked beforehand is checked here."""
    if (grid is None) == (bounds is None):
        raise InputError("give either grid or bounds, and not both", where="search")
    if budget is not None and budget < 1:
        raise InputError(f"expected a budget of at least one trial, got {budget}", where="search")
    draw = random.Random(seed)
    if grid is not None:
        points = _points(method, dict(grid) if isinstance(grid, Mapping) else {"scale": list(grid)})
        for values in points:
            varied(method, values)
        if optimizer not in (None, "grid", "random"):
            raise InputError(f"{optimizer} needs bounds, and a grid is given", where="search")
        if optimizer == "random":
            points = draw.sample(points, min(budget or TRIALS, len(points)))
        elif budget is not None and budget < len(points):
            fix = f"raise the budget, or let optimizer: random draw {budget} of them"
            raise InputError(f"the grid has {len(points)} points, the budget is {budget}", where="search", fix=fix)
        return _listed(points)
    assert bounds is not None
    if optimizer == "grid":
        raise InputError("optimizer: grid needs a grid, and bounds are given", where="search")
    box = _box(method, models, dict(bounds) if isinstance(bounds, Mapping) else {"scale": bounds})
    proposals = uniform(len(box), draw) if optimizer == "random" else evolve([a.unit(method) for a in box], draw)
    return _scaled(box, proposals, budget or TRIALS)


def _listed(points: list[Values]) -> Proposals:
    for values in points:  # noqa: UP028  (through `yield from` a list could be sent no score)
        yield values


def _points(method: Merge, grid: dict[str, Sequence[Any]]) -> list[Values]:
    """All combinations. What the survey looks at changes most slowly, so that it is made as seldom as can be."""
    _known(method, grid)
    names = sorted(grid, key=lambda name: name in method.after_survey)  # stable: else as given
    if not all(grid[name] for name in names):
        raise InputError("a name has no values to try", where="grid")
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*(grid[name] for name in names))]


@dataclass(frozen=True)
class Axis:
    """One number that is searched: a setting, or of one that is a list over the models its `index`-th."""

    name: str
    index: int | None
    low: float
    high: float

    def unit(self, method: Merge) -> float:
        """Where the method's own value lies between low (0) and high (1); the middle if it is not there."""
        value = getattr(method, self.name)
        if self.index is not None and isinstance(value, tuple):
            value = value[self.index]
        if not isinstance(value, int | float) or not self.low <= value <= self.high or self.low == self.high:
            return 0.5
        return (value - self.low) / (self.high - self.low)


def _box(method: Merge, models: int, bounds: dict[str, Any]) -> list[Axis]:
    """The axes of a search by bounds: one for each name, of a list over the models one for each of them."""
    _known(method, bounds)
    box = []
    for name, given in bounds.items():
        several = name in method.per_model
        pairs = list(given) if isinstance(given[0], Sequence) else [given] * (models if several else 1)
        if len(pairs) != (models if several else 1):
            raise InputError(f"{len(pairs)} bounds for {models} models", where=name)
        for index, (low, high) in enumerate(pairs):
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise InputError(f"expected bounds from low to high, got {low} to {high}", where=name)
            box.append(Axis(name, index if several else None, float(low), float(high)))
    varied(method, _values(box, [0.0] * len(box)))
    return box


def _known(method: Merge, names: Mapping[str, Any]) -> None:
    settings = set(type(method).model_fields) - {"method"}
    for name in names:
        if name not in settings:
            what = f"{method.method} has no setting {name!r}"
            raise InputError(what, where="search", fix=did_you_mean(name, settings))
    if not names:
        raise InputError("nothing is named that may vary", where="search")


def _values(box: list[Axis], point: Sequence[float]) -> Values:
    """The settings that a point of the unit cube means."""
    values: Values = {}
    for axis, share in zip(box, point, strict=True):
        number = axis.low + share * (axis.high - axis.low)
        values[axis.name] = number if axis.index is None else (*values.get(axis.name, ()), number)
    return values


def _scaled(box: list[Axis], points: Generator[list[float], float, None], budget: int) -> Proposals:
    """Values for the first `budget` points of the unit cube, whose scores are handed back."""
    point = next(points)
    for number in range(budget):
        score = yield _values(box, point)
        if number + 1 < budget:
            point = points.send(score)


def uniform(size: int, draw: random.Random) -> Generator[list[float], float, None]:
    """Points of the unit cube, each by itself."""
    while True:
        yield [draw.random() for _ in range(size)]


def evolve(
    start: Sequence[float], draw: random.Random, *, children: int = 4, spread: float = 0.25
) -> Generator[list[float], float, None]:
    """A (1 + `children`) evolution strategy in the unit cube: yields points, is sent their scores, higher is better.

    Args:
        start: the first point, and parent of the first children.
        spread: standard deviation of the first steps; times 1.5 after a better child, else times 0.8.

    A child that is as good as its parent takes its place, so that it can wander where all scores are the same.
    """
    parent = list(start)
    best = yield parent
    while True:
        made = []
        for _ in range(children):
            child = [_folded(x + spread * draw.gauss(0, 1)) for x in parent]
            made.append(((yield child), child))
        score, child = max(made, key=lambda pair: pair[0])
        spread = spread * 1.5 if score > best else max(spread * 0.8, 1e-3)
        if score >= best:
            best, parent = score, child


def _folded(x: float) -> float:
    """Into 0 to 1, as a mirror at each end does."""
    x = abs(x) % 2
    return 2 - x if x > 1 else x
