"""Merges as a command asks for them: a recipe read and checked, planned, or done.

Here, above the rooms, data files become batches and named functions become callables, which the room of merges takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from luthier.data.read import import_callable
from luthier.errors import InputError
from luthier.merge.base import Merge, WholeModelMerge
from luthier.merge.lineup import Step
from luthier.merge.memory import memory_of
from luthier.merge.recipe import MergeRecipe, StepSettings, last_step
from luthier.merge.run import MergeResult, Say, lined_up, merge
from luthier.merge.search import merge_search
from luthier.pipeline.recipe_text import override, parse, read_text


class Asked:
    """A checked merge recipe and the folder its paths are relative to."""

    def __init__(self, recipe: MergeRecipe, folder: Path):
        self.recipe, self.folder = recipe, folder


def read_recipe(source: Path | Mapping[str, Any], settings: Sequence[str] = ()) -> Asked:
    """The recipe in a file or a mapping, with settings of its (last) method such as `density=0.2` laid over it.

    Raises `InputError` with the file and key for what it may not say.
    """
    folder, name = Path(), "merge"
    if isinstance(source, Path):
        name, text = read_text(source, {})
        value, _ = parse(text, name)
        folder = source.parent
    else:
        value = dict(source)
    steps = value.get("steps")
    step = steps[-1] if isinstance(steps, list) and steps and isinstance(steps[-1], dict) else value
    if isinstance(step.get("method"), str):
        step["method"] = {"method": step["method"]}
    for text in settings:
        if not isinstance(step.get("method"), dict):
            raise InputError("no method is named that could be set", where=text)
        override(step["method"], text)
    try:
        return Asked(MergeRecipe.model_validate(value), folder)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in first["loc"]]
        if "steps" not in value:
            path = path[2:] if path[:1] == ["steps"] else path
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        message = message.splitlines()[0] if "validation error" not in message else _inner(message)
        raise InputError(message, where=f"{name}: {'.'.join(path)}".rstrip(": ")) from None


def _inner(message: str) -> str:
    """What a nested complaint of pydantic says: which key, and why."""
    lines = [line.strip() for line in message.splitlines()]
    why = lines[2].split(" [type=")[0] if len(lines) > 2 else lines[0]
    return f"{lines[1]}: {why}" if len(lines) > 1 else why


def merge_models(
    asked: Asked,
    out: Path,
    *,
    data: Path | Iterable[Any] | None = None,
    evaluate: Callable[[Any], float] | None = None,
    say: Say = lambda done, total: None,
) -> MergeResult:
    """Do what was asked for and write it to the new folder `out`."""
    step, models, base = last_step(asked.recipe, asked.folder)
    if evaluate is None and asked.recipe.evaluate is not None:
        evaluate = import_callable(asked.recipe.evaluate)
    if asked.recipe.search is not None:
        if evaluate is None:
            raise InputError("a search needs something that scores a model", where="search", fix="name it as evaluate")
        found = merge_search(
            step.method,
            models=list(models.values()),
            base=base,
            grid=asked.recipe.search,
            evaluate=evaluate,
            out=out,
            vocabulary=step.vocabulary,
        )
        return found.merged
    batches, loss = None, None
    if data is not None:
        batches, loss = batches_of(data, step, models, base)
    return merge(
        step.method,
        models=list(models.values()),
        base=base,
        out=out,
        data=batches,
        loss=loss,
        evaluate=evaluate,
        vocabulary=step.vocabulary,
        say=say,
    )


def batches_of(
    data: Path | Iterable[Any], step: StepSettings, models: Mapping[str, Any], base: Any
) -> tuple[list[dict[str, Any]], Callable[..., Any]]:
    """The rows of a file as batches of one row, in the tokens of the models, and the loss of supervised tuning."""
    import tempfile

    import torch

    from luthier.data.prepare import prepare
    from luthier.data.rows import Rows
    from luthier.data.settings import DataSettings
    from luthier.data.store import encode_split
    from luthier.models import ModelSettings, load_tokenizer
    from luthier.objectives import Sft

    if not isinstance(data, str | Path):
        return list(data), lambda model, batch: Sft().loss(model, batch).value()
    place = next(
        (p for p in (*models.values(), base) if isinstance(p, str) and (Path(p) / "tokenizer.json").is_file()), None
    )
    if place is None:
        raise InputError("no model has a tokenizer beside it, so rows cannot be read", where=str(data))
    settings = DataSettings.model_validate({"source": str(data), "split": [1.0, 0.0, 0.0], "deduplicate": "none"})
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(settings, Path(scratch) / "rows", seed=0)
        encoded = encode_split(
            Rows(prepared.files["train"]), load_tokenizer(ModelSettings(base=place)), settings, Path(scratch)
        )
        rows = [encoded[index] for index in range(len(encoded))]
    batches = [{"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])} for row in rows]
    return batches, lambda model, batch: Sft().loss(model, batch).value()


def plan_merge(asked: Asked, out: Path | None) -> dict[str, Any]:
    """What a merge would do and cost, json-able; only headers are read."""
    told = []
    memory = 0
    size = 0
    for number, settings in enumerate(asked.recipe.steps):
        partial = MergeRecipe(steps=asked.recipe.steps[: number + 1])
        _, models, base = last_step(partial, asked.folder)
        about: dict[str, Any] = {
            "name": settings.name,
            "method": settings.method.model_dump(mode="json"),  # type: ignore[attr-defined]
            "models": list(models),
            "base": settings.base,
        }
        if isinstance(settings.method, WholeModelMerge):
            told.append(about | {"tensors": 0, "elements": 0, "copied": 0, "repeated": 0, "passes": 0, "bytes": 0})
            continue
        assert isinstance(settings.method, Merge)
        step = Step(settings.method, lined_up(settings.method, list(models.values()), base, settings.vocabulary))
        lineup = step.lineup
        memory += memory_of(step)
        size = sum(info.bytes for info in lineup.infos.values())
        told.append(
            about
            | {
                "tensors": len(lineup.names),
                "elements": lineup.elements,
                "copied": len(lineup.copied),
                "repeated": len(lineup.repeats),
                "passes": settings.method.passes + 1,
                "bytes": lineup.bytes,
            }
        )
    return {"steps": told, "memory_bytes": memory, "output_bytes": size, "output": str(out) if out else None}
