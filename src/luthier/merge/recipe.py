"""Merge recipes: one step or a chain of them in a YAML file, checked in full before anything is read.

    base: models/base
    models: {maths: models/maths, code: models/code, chat: models/chat}
    method: {method: ties, density: 0.2, scale: {"*embed*": 0.5, "*": [0.6, 1.0]}}

    steps:                                              # or a chain; the last step is what is written
      - {name: skills, method: breadcrumbs, base: models/base, models: [models/maths, models/code]}
      - {name: whole, method: {method: slerp, t: 0.3}, models: [models/chat, skills]}

    evaluate: my_tasks:score                            # judges a model, for greedy soups and for a search
    search: {scale: [0.4, 0.7, 1.0]}                    # of the last step: all combinations, the best is written

A name of an earlier step, or a key of `models`, stands for what it means; everything else is a path, relative to the
recipe's own folder. What one step makes is never written for the next: its rows are computed when they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from luthier.errors import InputError
from luthier.merge.base import Merge, WholeModelMerge
from luthier.merge.lineup import MergedSource, Step
from luthier.merge.run import lined_up
from luthier.methods import field


def _models(value: Any) -> Any:
    """A list of places, or names with places, as names with places."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        found = {str(place): place for place in value}
        twice = next((place for place in found if [str(other) for other in value].count(place) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is named twice; give models names, or a model a larger weight")
        return found
    raise ValueError(f"expected a list of models, or names with places, got {type(value).__name__}")


Models = Annotated[dict[str, str], BeforeValidator(_models)]


class StepSettings(BaseModel):
    """One merge of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: field("merge")  # type: ignore[valid-type]
    models: Models = Field(min_length=1)
    base: str | None = None
    vocabulary: Literal["refuse", "map"] = "refuse"
    name: str = "merged"


class MergeRecipe(BaseModel):
    """Steps in order; a recipe of one step may be written without `steps`.

    Attributes:
        evaluate: `module:function` of a callable that scores a model, higher is better.
        search: values to try by name of a setting of the last step (see `luthier.merge.search`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[StepSettings, ...] = Field(min_length=1)
    evaluate: str | None = None
    search: dict[str, tuple[Any, ...]] | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "steps" not in value:
            own = {key: value[key] for key in ("evaluate", "search") if key in value}
            return {"steps": [{key: given for key, given in value.items() if key not in own}], **own}
        return value

    @model_validator(mode="after")
    def _sound(self) -> MergeRecipe:
        names = [step.name for step in self.steps]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two steps are called {twice[0]!r}; give each a name of its own")
        if self.search is not None and isinstance(self.steps[-1].method, WholeModelMerge):
            raise ValueError("a search varies merges of tensors; the last step runs its models")
        whole = [step.name for step in self.steps[:-1] if isinstance(step.method, WholeModelMerge)]
        if whole:
            raise ValueError(f"step {whole[0]!r} runs its models, so it must be the last one or a recipe of its own")
        return self


def last_step(recipe: MergeRecipe, folder: Path) -> tuple[StepSettings, dict[str, Any], Any]:
    """The last step of a recipe with its models and its base, earlier steps in place as sources.

    Args:
        folder: what relative paths are relative to.
    """
    made: dict[str, Any] = {}
    for number, step in enumerate(recipe.steps):
        models = {name: _place(place, made, folder) for name, place in step.models.items()}
        base = _place(step.base, made, folder) if step.base is not None else None
        if number == len(recipe.steps) - 1:
            return step, models, base
        assert isinstance(step.method, Merge)
        try:
            lineup = lined_up(step.method, list(models.values()), base, step.vocabulary)
            made[step.name] = MergedSource(Step(step.method, lineup), step.name)
        except InputError as error:
            raise InputError(
                error.what, where=f"step {step.name}: {error.where or ''}".rstrip(": "), fix=error.fix
            ) from None
    raise AssertionError("a recipe has a last step")


def _place(place: str, made: Mapping[str, Any], folder: Path) -> Any:
    if place in made:
        return made[place]
    return str(folder / place) if not Path(place).is_absolute() else place
