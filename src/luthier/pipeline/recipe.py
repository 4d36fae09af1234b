"""The recipe: one YAML file that says what a run does, checked in full before anything is done.

    name: support-bot
    data:     {source: chats.jsonl}
    model:    {base: path/to/model}
    tune:     {method: lora, rank: 16, objective: {method: sft}, train: {learning_rate: 2.0e-4}}
    evaluate: {tasks: [...], gates: {min_gain: 0.0, max_forgetting: 2.0}}

`tune` is one phase or a list of phases. Relative paths are taken from the folder in which the command runs. A key that
nobody knows is an error with the nearest known one; the file, the line and the dotted key are always named.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from luthier.data.settings import DataSettings
from luthier.errors import InputError, did_you_mean
from luthier.evaluate.settings import EvaluateSettings
from luthier.methods import build, field, find, table
from luthier.models.settings import ModelSettings
from luthier.train.settings import TrainSettings


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EnvironmentSettings(Section):
    """Seed, device, threads of a run, and the trackers (through accelerate) that are told of each step."""

    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()


class DeploySettings(Section):
    """What is released: `merge` folds an adapter into the weights, so that the release is a model of its own."""

    merge: bool = False


class MonitorSettings(Section):
    """A JSONL log of requests, the window of its last lines, and the limits of drift (population stability index)."""

    log: str | None = None
    window: int = Field(default=500, ge=1)
    min_requests: int = Field(default=100, ge=1)
    psi_warn: float = Field(default=0.2, gt=0, allow_inf_nan=False)
    psi_error: float = Field(default=0.3, gt=0, allow_inf_nan=False)


class Phase(Section):
    """One phase of tuning; in YAML one flat mapping: the tuning's own keys beside `objective` and `train`."""

    tuning: field("tune")  # type: ignore[valid-type]
    objective: field("objectives") = Field(default_factory=lambda: build("objectives", "sft"))  # type: ignore[valid-type]
    train: TrainSettings = TrainSettings()

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"method": value}
        if isinstance(value, Mapping) and "tuning" not in value:
            parts = {key: value[key] for key in ("objective", "train") if key in value}
            rest = {key: v for key, v in value.items() if key not in parts}
            return {"tuning": build("tune", rest), **parts}
        return value

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        own = self.tuning.model_dump(mode="json")
        return {**own, "objective": self.objective.model_dump(mode="json"), "train": self.train.model_dump(mode="json")}


class Recipe(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    data: DataSettings
    model: ModelSettings
    environment: EnvironmentSettings = EnvironmentSettings()
    tune: tuple[Phase, ...] = Field(min_length=1)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    deploy: DeploySettings = DeploySettings()
    monitor: MonitorSettings = MonitorSettings()

    @field_validator("tune", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, Mapping | str) else value


def packaged() -> dict[str, str]:
    """The recipes inside the package: name -> YAML text."""
    folder = resources.files("luthier.pipeline").joinpath("recipes")
    files = (f for f in folder.iterdir() if f.name.endswith(".yaml"))
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in sorted(files, key=lambda f: f.name)}


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """A checked recipe from a file, the name of a packaged one, or a mapping, with `a.b=value` overrides applied."""
    if isinstance(source, Recipe):
        if not overrides:
            return source
        source = yaml.safe_load(dump_recipe(source))
    if isinstance(source, Mapping):
        name, text = "recipe", yaml.safe_dump(dict(source), sort_keys=False)
    elif isinstance(source, str | Path):
        name, text = _read(source)
    else:
        raise InputError(f"a recipe is a path, a name or a mapping, got {type(source).__name__}")
    value, lines = _parse(text, name)
    for override in overrides:
        _override(value, override)
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise _explain(error, name, lines, value) from None


def dump_recipe(recipe: Recipe) -> str:
    """YAML of a recipe with all its defaults; loads back equal."""
    return yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors; each registered method's own schema stands under `$defs`."""
    schema = Recipe.model_json_schema(by_alias=True)
    definitions = schema.setdefault("$defs", {})
    refs: dict[str, list[dict[str, str]]] = {}
    for room in ("tune", "objectives", "evaluate"):
        for name in table(room):
            own = find(room, name).model_json_schema()
            definitions.update(own.pop("$defs", {}))
            if room == "tune":
                own["properties"] |= {"objective": {"type": "object"}, "train": {"$ref": "#/$defs/TrainSettings"}}
            definitions[f"{room}.{name}"] = own
            refs.setdefault(room, []).append({"$ref": f"#/$defs/{room}.{name}"})
    phase = {"anyOf": refs["tune"]}
    schema["properties"]["tune"] = {"anyOf": [phase, {"type": "array", "items": phase, "minItems": 1}]}
    definitions["EvaluateSettings"]["properties"]["tasks"]["items"] = {"anyOf": refs["evaluate"]}
    return schema


def _read(source: str | Path) -> tuple[str, str]:
    path = Path(source)
    known = packaged()
    if not path.exists() and str(source) in known:
        return f"{source} (packaged)", known[str(source)]
    if not path.is_file():
        what = "is a folder, not a recipe" if path.is_dir() else "there is no such recipe"
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise InputError(what, where=str(source), fix=did_you_mean(str(source), [*known, *near]))
    try:
        return str(path), path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start} is not UTF-8", where=str(path), fix="save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None


Lines = dict[tuple[str | int, ...], int]


def _parse(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """The mapping in a YAML text, and the line of each of its keys."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            raise InputError("the recipe is empty", where=name, fix="`luthier recipes` lists examples")
        if not isinstance(node, yaml.MappingNode):
            raise InputError("a recipe is a mapping of sections such as data, model, tune", where=f"{name}:1")
        lines = dict(_lines(node, (), name))
        return yaml.safe_load(text), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise InputError(f"not valid YAML: {error.problem}", where=where) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"not valid YAML: {str(error).splitlines()[0]}", where=name) from None


def _lines(node: yaml.Node, path: tuple[str | int, ...], name: str) -> Iterator[tuple[tuple[str | int, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                where = f"{name}:{key.start_mark.line + 1}"
                raise InputError(f"the key {key.value!r} stands here a second time", where=where, fix="remove one")
            seen.add(key.value)
            yield (*path, key.value), key.start_mark.line + 1
            yield from _lines(value, (*path, key.value), name)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item.start_mark.line + 1
            yield from _lines(item, (*path, index), name)


def _override(value: dict[str, Any], override: str) -> None:
    """Set one dotted key in place."""
    dotted, sign, text = override.partition("=")
    keys = dotted.split(".")
    if not sign or not all(keys):
        raise InputError(f"{override!r} is not an override", fix="write section.key=value, such as tune.rank=8")
    try:
        new = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"the value of {dotted} is not valid YAML: {text!r}", fix="put it in quotes") from None
    place: Any = value
    for number, key in enumerate(keys):
        last = number == len(keys) - 1
        index: Any = key
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                what = f"{'.'.join(keys[:number])} is a list of {len(place)}, so {key!r} names nothing in it"
                raise InputError(what, where=override, fix=f"use a number below {len(place)}")
            index = int(key)
        elif not isinstance(place, dict):
            raise InputError(f"{'.'.join(keys[:number])} is a plain value and has no key {key!r}", where=override)
        if last:
            place[index] = new
        else:
            if isinstance(place, dict) and place.get(index) is None:
                place[index] = {}
            place = place[index]


def _explain(error: ValidationError, name: str, lines: Lines, value: Any) -> InputError:
    """The first of pydantic's complaints as one sentence; the others are counted."""
    problems = error.errors(include_url=False)
    first = problems[0]
    path = tuple(part for part in first["loc"] if part not in ("tuning",))
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    dotted = ".".join(str(part) for part in path) or "recipe"
    where = f"{name}:{line}: {dotted}" if line else f"{name}: {dotted}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    kind, given = first["type"], first.get("input")
    if kind == "extra_forbidden":
        known = _allowed(Recipe, path[:-1]) or []
        known = _method_keys(path[:-1], value) or known
        return InputError(f"unknown key {str(path[-1])!r}{more}", where=where, fix=did_you_mean(str(path[-1]), known))
    if kind == "missing":
        return InputError(f"this section or key is missing{more}", where=where, fix="add it")
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    message = message[0].lower() + message[1:] if message else kind
    shown = repr(given)
    got = "" if kind == "value_error" or len(shown) > 80 else f", got {shown}"
    return InputError(f"{message}{got}{more}", where=where)


def _method_keys(path: Sequence[str | int], value: Any) -> list[str]:
    """The keys of the method that stands at `path` of the recipe; none if no method stands there."""
    room = {"tune": "tune", "objective": "objectives", "tasks": "evaluate"}.get(
        next((str(part) for part in reversed(path) if not isinstance(part, int)), "")
    )
    for part in path:
        if isinstance(value, Mapping):
            value = value.get(part, value if isinstance(part, int) else None)
        elif isinstance(value, Sequence) and isinstance(part, int) and part < len(value):
            value = value[part]
    if room is None or not isinstance(value, Mapping) or value.get("method") not in table(room):
        return []
    extra = ["objective", "train"] if room == "tune" else []
    return [*find(room, value["method"]).model_fields, *extra]


def _allowed(model: Any, path: Sequence[str | int]) -> list[str]:
    """The keys that a settings class has at `path`."""
    for part in path:
        if isinstance(part, int):
            continue
        info = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        model = next(_models(info.annotation), None) if info else None
        if model is None:
            return []
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return []
    return [info.alias or key for key, info in model.model_fields.items()]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) is not None or isinstance(annotation, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _models(part)
