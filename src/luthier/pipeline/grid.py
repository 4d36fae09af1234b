"""The `study` section of a recipe: axes with labels, each label a few changes, and the grid of recipes they span.

    study:
      vary:
        start:  {direct: {tune.0: null}, after_sft: {}}
        method: {dpo: {tune.-1.objective: {method: dpo}}, ipo: {tune.-1.objective: {method: ipo}}}
        size:   {1k: {data.sample: 1000}, all: {}}

A cell takes one label of every axis; its changes are laid over the recipe, axis after axis, in the order in which they
are written. A change is a dotted setting as on the command line, or a mapping:

    a plain value                  is set
    a mapping                      is laid over the one that is there, key by key
    a mapping that names a method  stands instead of the one that is there; a phase of tuning keeps its objective and
                                   train unless they are named too
    a new `method` alone           does the same: the other method begins with its own defaults
    null in a place of a list      takes the entry out (`tune.0: null`, `data.source.1: null`); what follows moves up

Nothing here knows what a recipe may say; `luthier.pipeline.recipe` checks every cell before anything runs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from luthier.pipeline.recipe_text import Place, locate, phase_keys

MOST_CELLS = 1000
KEPT = ("objective", "train")  # of a phase of tuning, whatever its method
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_TAKEN = ("metric", "value")  # columns of the table beside the axes

Axes = dict[str, dict[str, dict[str, Any]]]


class StudySettings(BaseModel):
    """What is varied, the last stage of each cell (`deploy` makes a release of every one), and the codes of findings
    that stop no cell although they are errors: what would stop a release need not stop a comparison."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vary: Axes = Field(description="Axes: name -> label -> changes to the recipe.")
    until: Literal["data", "model", "environment", "tune", "evaluate", "deploy"] = "evaluate"
    allow: tuple[str, ...] = ()

    @field_validator("vary", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        """Labels as words (YAML reads `1000:` as a number), and a label without changes as one with none."""
        if not isinstance(value, Mapping):
            return value
        return {
            axis: {str(label): {} if changes is None else changes for label, changes in labels.items()}
            if isinstance(labels, Mapping)
            else labels
            for axis, labels in value.items()
        }

    @field_validator("vary")
    @classmethod
    def _sound(cls, vary: Axes) -> Axes:
        if not vary:
            raise ValueError("no axis is named")
        for axis, labels in vary.items():
            if axis in _TAKEN:
                raise ValueError(f"an axis cannot be called {axis!r}, which is a column of the table")
            if not labels:
                raise ValueError(f"the axis {axis!r} has no labels")
            if "." in axis:
                raise ValueError(f"the name of the axis {axis!r} has a dot in it")
            for word in (axis, *labels):
                if not _WORD.fullmatch(word):
                    raise ValueError(f"{word!r} cannot name a folder; use letters, digits, dots, dashes and plus signs")
            for label, changes in labels.items():
                for key in changes:
                    if key.split(".")[0] in ("name", "study"):
                        raise ValueError(f"axis {axis!r}, label {label!r}: {key!r} is the same for all cells")
        if (cells := prod(map(len, vary.values()))) > MOST_CELLS:
            raise ValueError(f"{cells:,} cells are more than {MOST_CELLS:,}; leave labels out, or make several studies")
        return vary


@dataclass
class Cell:
    """One point of the grid.

    Attributes:
        labels: label by axis.
        value: the recipe as plain values, without `study`.
        set_by: which change set each place of `value`, as `vary.axis.label`.
    """

    labels: dict[str, str]
    value: dict[str, Any]
    set_by: dict[Place, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its labels in words."""
        return ", ".join(f"{axis} {label}" for axis, label in self.labels.items())

    @property
    def folder(self) -> str:
        """Its folder below `cells/`, one level for each axis."""
        return "/".join(self.labels.values())


def grid(recipe: Mapping[str, Any], vary: Axes, where: Callable[[str], str] = lambda place: place) -> list[Cell]:
    """The cells of a study, the last axis running fastest.

    Args:
        recipe: plain values with every default written out; it stays as it is.
        where: what errors call a change, from `vary.axis.label`.

    Raises `InputError` where a change names nothing in the recipe.
    """
    cells = []
    common = {key: value for key, value in recipe.items() if key != "study"}
    for labels in product(*vary.values()):
        cell = Cell(dict(zip(vary, labels, strict=True)), copy.deepcopy(common))
        for axis, label in cell.labels.items():
            by = f"study.vary.{axis}.{label}"
            for key, new in vary[axis][label].items():
                for place in change(cell.value, key.split("."), copy.deepcopy(new), f"{where(by)}.{key}"):
                    cell.set_by[place] = by
        cells.append(cell)
    return cells


def change(recipe: dict[str, Any], keys: Sequence[str], new: Any, text: str) -> list[Place]:
    """Make one change to `recipe` in place, by the rules above; returns the places that were set."""
    keys = phase_keys(recipe, keys)
    inside, at, place = locate(recipe, keys, text)
    if isinstance(inside, list) and new is None:
        del inside[at]
        return [place[:-1]]
    old = inside[at] if isinstance(inside, list) else inside.get(at)
    if isinstance(new, Mapping) and "method" not in new and (isinstance(old, dict) or _one_phase(keys, old)):
        inner = [(f"{text}.{key}", [*keys, str(key)], value) for key, value in new.items()]
        return [done for at, path, value in inner for done in change(recipe, path, value, at)]
    if isinstance(new, Mapping) and _one_phase(keys, old):
        return change(recipe, [*keys, "0"], new, text)
    if isinstance(new, Mapping) and isinstance(old, dict) and place[0] == "tune" and len(place) == 2:
        new = {**new, **{key: old[key] for key in KEPT if key in old and key not in new}}
    elif at == "method" and isinstance(inside, dict) and inside.get("method") != new:
        for key in [key for key in inside if key not in KEPT]:
            del inside[key]
    inside[at] = new
    return [place]


def _one_phase(keys: Sequence[str], value: Any) -> bool:
    """Whether `value` is a list of one phase, which may be written without the list."""
    return list(keys) == ["tune"] and isinstance(value, list) and len(value) == 1
