"""Stage 1, data: read the sources, clean, split, hold them against the rows that will judge the outcome, select."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from luthier.data.clean import row_text
from luthier.data.prepare import prepare
from luthier.errors import InputError
from luthier.evaluate.task import Context as TaskContext
from luthier.pipeline.recipe import Recipe
from luthier.pipeline.selection import selection_context
from luthier.pipeline.stage import Context, Outcome, Stage, file_digest


class DataStage(Stage):
    """Writes train.jsonl, validation.jsonl, test.jsonl and datacard.json."""

    name = "data"

    def settings(self, recipe: Recipe) -> Any:
        tasks = [task.model_dump(mode="json") for task in recipe.evaluate.tasks]
        wanted = {"data": recipe.data.model_dump(mode="json"), "tasks": tasks, "seed": recipe.environment.seed}
        if recipe.data.select is not None:  # it may score rows with the model that is going to be tuned
            wanted["model"] = recipe.model.model_dump(mode="json")
        return wanted

    def sources(self, recipe: Recipe) -> Any:
        named = [recipe.data.source, recipe.data.validation_source, recipe.data.test_source]
        named += [task.source for task in recipe.evaluate.tasks]
        return [_contents(source) for group in named for source in (group or ())]

    def run(self, context: Context, directory: Path) -> Outcome:
        recipe = context.recipe
        tasks = TaskContext(recipe.data, seed=recipe.environment.seed)
        texts = [row_text(row) for task in recipe.evaluate.tasks if task.source for row in task.rows(tasks)]
        seed, select = recipe.environment.seed, recipe.data.select
        apply = partial(select.apply, context=selection_context(context)) if select is not None else None
        prepared = prepare(recipe.data, directory, seed=seed, evaluation_texts=texts, select=apply)
        files = [path.name for path in prepared.files.values()]
        return Outcome(prepared.findings, {"card": prepared.card}, [*files, "datacard.json"])


def _contents(source: Any) -> Any:
    """Hashes of what a source holds now, so that a changed file is noticed; a callable is known by its arguments."""
    path = getattr(source, "path", None)
    if path is None:
        return str(source)
    place = Path(path)
    if place.is_dir():
        return [[p.relative_to(place).as_posix(), file_digest(p)] for p in sorted(place.rglob("*")) if p.is_file()]
    if not place.is_file():
        raise InputError("there is no such file", where=str(place), fix="check data.source")
    return file_digest(place)
