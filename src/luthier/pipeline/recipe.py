"""The recipe: one YAML file that says what a run does, checked in full before anything is done.

    name: support-bot
    data:     {source: chats.jsonl}
    model:    {base: path/to/model}
    tune:     {method: lora, rank: 16, objective: {method: sft}, train: {learning_rate: 2.0e-4}}   # or a list
    evaluate: {tasks: [...], gates: {min_gain: 0.0, max_forgetting: 2.0}}

`tune` is one phase or a list of phases, `objective` one objective or a weighted list of them. With a section `study`
the recipe is run once for every cell of a grid (`luthier.pipeline.grid`), and each cell is checked here as a recipe of
its own. Relative paths are taken from the folder in which the command runs. A key that nobody knows is an error with
the nearest known one; the file, the line and the dotted key are always named.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from luthier.data.settings import DataSettings
from luthier.errors import InputError, did_you_mean
from luthier.evaluate.settings import EvaluateSettings
from luthier.methods import Method, build, field, find, table
from luthier.models.settings import ModelSettings
from luthier.pipeline.grid import Cell, StudySettings, grid
from luthier.pipeline.recipe_text import Lines, Place, override, parse, plain, read_text
from luthier.pipeline.search_grid import SearchSettings
from luthier.train.settings import TrainSettings


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EnvironmentSettings(Section):
    """Seed, device, threads of a run, the trackers (through accelerate) that are told of each step, and a search over
    learning rates and batch sizes."""

    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    search: SearchSettings | None = None


class DeploySettings(Section):
    """What is released: `merge` folds an adapter into the weights, so that the release is a model of its own; `delta`
    also writes what leads from the base to the release, exact to the last bit."""

    merge: bool = False
    delta: bool = False


class MonitorSettings(Section):
    """A JSONL log of requests, the window of its last lines, and the limits of drift (population stability index)."""

    log: str | None = None
    window: int = Field(default=500, ge=1)
    min_requests: int = Field(default=100, ge=1)
    psi_warn: float = Field(default=0.2, gt=0, allow_inf_nan=False)
    psi_error: float = Field(default=0.3, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _warns_first(self) -> MonitorSettings:
        if self.psi_warn > self.psi_error:
            raise ValueError(f"psi_warn ({self.psi_warn:g}) lies above psi_error ({self.psi_error:g})")
        return self


def _objective(value: Any) -> Any:
    from luthier.objectives import objective_of  # with torch, which a recipe without an error needs anyway

    return objective_of(value)


class Phase(Section):
    """One phase of tuning; in YAML one flat mapping: the tuning's own keys beside `objective` and `train`."""

    tuning: field("tune")  # type: ignore[valid-type]
    objective: Annotated[SerializeAsAny[Method], BeforeValidator(_objective)] = Field(
        default_factory=lambda: build("objectives", "sft")
    )
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

    @property
    def learns_labels(self) -> bool:
        """Whether the objective learns classes, and not tokens."""
        return bool(self.objective.learns_labels)  # type: ignore[attr-defined]

    @model_validator(mode="after")
    def _learns_what_it_predicts(self) -> Phase:
        from luthier.tune.base import refuse_labels

        try:
            refuse_labels(self.tuning, self.objective)
        except InputError as error:
            raise ValueError(str(error)) from None
        return self

    @field_validator("tuning")
    @classmethod
    def _learns_from_rows(cls, value: Any) -> Any:
        if value.in_sessions:
            raise ValueError(
                f"{value.method} adds classes in sessions of labelled pictures, which a recipe cannot drive yet; "
                "use luthier.train.SessionRun from Python"
            )
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
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings, validate_default=True)
    deploy: DeploySettings = DeploySettings()
    monitor: MonitorSettings = MonitorSettings()
    study: StudySettings | None = None

    @field_validator("tune", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, Mapping | str) else value

    @field_validator("evaluate", mode="before")
    @classmethod
    def _own_test_split(cls, value: Any, info: ValidationInfo) -> Any:
        """Classes are judged by classification where no task is named."""
        tune = info.data.get("tune")
        if not tune or not tune[0].learns_labels:
            return value
        given = value.model_dump(exclude_unset=True) if isinstance(value, EvaluateSettings) else value
        if isinstance(given, Mapping) and "tasks" not in given:
            return {**given, "tasks": [{"method": "classification", "name": "test"}]}
        return value

    @model_validator(mode="after")
    def _tunings_follow(self) -> Recipe:
        before = [None, *(phase.tuning.method for phase in self.tune)]
        for number, phase in enumerate(self.tune):
            wanted = phase.tuning.continues
            if wanted and before[number] not in wanted:
                found = f"the phase before it is {before[number]}" if before[number] else "it is the first phase"
                raise ValueError(
                    f"tune.{number}: {phase.tuning.method} goes on after {' or '.join(wanted)}, and {found}"
                )
        return self

    @property
    def learns_labels(self) -> bool:
        """Whether the rows' classes are learned, and not tokens."""
        return self.tune[0].learns_labels

    @model_validator(mode="after")
    def _learns_one_thing(self) -> Recipe:
        for number, phase in enumerate(self.tune):
            if phase.learns_labels != self.learns_labels:
                raise ValueError(f"tune.{number}: all phases learn classes (objective: classification), or none does")
            if phase.tuning.predicts == "labels" and number + 1 < len(self.tune):
                raise ValueError(
                    f"tune.{number}: {phase.tuning.method} gives no plain model that a phase could go on from"
                )
        if self.deploy.merge and self.tune[-1].tuning.predicts == "labels":
            raise ValueError(
                f"deploy.merge: {self.tune[-1].tuning.method} stands beside the base and folds into no weights"
            )
        if not self.learns_labels:
            return self
        if self.data.label_key is None:
            raise ValueError("data.label_key: objective classification learns the class of a row; name its column")
        plain = DataSettings(source=self.data.source)
        for key in ("template", "system", "loss_on"):
            if getattr(self.data, key) != getattr(plain, key):
                raise ValueError(f"data.{key} says how answers are learned, and classification learns classes")
        if self.data.packing is True:
            raise ValueError("data.packing: rows with a class are never laid end to end")
        return self

    @model_validator(mode="after")
    def _search_suits_tune(self) -> Recipe:
        if self.environment.search:
            self.environment.search.suits(self.tune)
        return self


def packaged() -> dict[str, str]:
    """The recipes inside the package: name -> YAML text."""
    folder = resources.files("luthier.pipeline").joinpath("recipes")
    files = (f for f in folder.iterdir() if f.name.endswith(".yaml"))
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in sorted(files, key=lambda f: f.name)}


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """A checked recipe from a file, the name of a packaged one, or a mapping, with `a.b=value` overrides applied."""
    lines: Lines = {}
    if isinstance(source, Recipe):
        if not overrides:
            return source
        name, value = "recipe", source.model_dump(mode="json", by_alias=True)
    elif isinstance(source, Mapping):
        name, value = "recipe", plain(source)
    elif isinstance(source, str | Path):
        name, text = read_text(source, packaged())
        value, lines = parse(text, name)
    else:
        raise InputError(f"a recipe is a path, a name or a mapping, got {type(source).__name__}")
    overridden = {override(value, text): f"override {text}" for text in overrides}
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise _explain(error, name, lines, value, overridden) from None
    cells(recipe, name, lines)
    return recipe


def cells(recipe: Recipe, name: str = "recipe", lines: Lines | None = None) -> list[tuple[Cell, Recipe]]:
    """Every cell of a recipe's study with its own recipe, without a study; none for a recipe without one.

    Raises `InputError` that names axis and label where a cell is no valid recipe.
    """
    if recipe.study is None:
        return []
    known = lines or {}

    def where(by: str) -> str:
        line = known.get(tuple(by.split(".", 3)))
        return f"{name}:{line}: {by}" if line else f"{name}: {by}"

    made = []
    for cell in grid(recipe.model_dump(mode="json", by_alias=True), recipe.study.vary, where):
        try:
            made.append((cell, Recipe.model_validate(cell.value)))
        except ValidationError as error:
            overridden = {place: where(by) for place, by in cell.set_by.items()}
            raise _explain(error, f"{name}, {cell.name}", {}, cell.value, overridden) from None
    return made


def dump_recipe(recipe: Recipe) -> str:
    """YAML of a recipe with all its defaults; loads back equal."""
    value = recipe.model_dump(mode="json", by_alias=True)
    if value["study"] is None:
        del value["study"]
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors; each registered method's own schema stands under `$defs`."""
    schema = Recipe.model_json_schema(by_alias=True)
    definitions = schema.setdefault("$defs", {})
    refs: dict[str, list[dict[str, Any]]] = {}
    parts: list[dict[str, Any]] = [{"type": "string", "enum": sorted(table("objectives"))}]  # of a weighted list
    for room in ("data", "objectives", "tune", "evaluate"):
        refs[room] = [{"type": "string", "enum": sorted(table(room))}]  # a bare name is a method with its defaults
        for name in table(room):
            own = find(room, name).model_json_schema(by_alias=True)
            definitions.update(own.pop("$defs", {}))
            if room == "tune":
                listed = {"type": "array", "items": {"anyOf": parts}, "minItems": 1}
                own["properties"] |= {"objective": {"anyOf": [*refs["objectives"], listed]}}
                own["properties"] |= {"train": {"$ref": "#/$defs/TrainSettings"}}
            if room == "objectives":
                weight = {"weight": {"type": "number", "minimum": 0, "default": 1.0}}
                definitions[f"{room}.{name}.weighted"] = {**own, "properties": own["properties"] | weight}
                parts.append({"$ref": f"#/$defs/{room}.{name}.weighted"})
            definitions[f"{room}.{name}"] = own
            refs[room].append({"$ref": f"#/$defs/{room}.{name}"})
    for name in ("Phase", "Method"):  # known by their parts above
        definitions.pop(name, None)
    phase = {"anyOf": refs["tune"]}
    schema["properties"]["tune"] = {"anyOf": [phase, {"type": "array", "items": phase, "minItems": 1}]}
    definitions["DataSettings"]["properties"]["select"] = {"anyOf": [*refs["data"], {"type": "null"}], "default": None}
    definitions["EvaluateSettings"]["properties"]["tasks"]["items"] = {"anyOf": refs["evaluate"]}
    return schema


def _explain(
    error: ValidationError, name: str, lines: Lines, value: Mapping[str, Any], overridden: Mapping[Place, str]
) -> InputError:
    """The weightiest of pydantic's complaints as one sentence; the others are counted.

    An unknown key comes first: it is often the misspelt form of one that is missing.
    """
    problems = [p for p in error.errors(include_url=False) if p["type"] != "too_short" or not p["input"]]
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    path: Place = tuple(part for part in first["loc"] if part != "tuning")
    if path[:2] == ("tune", 0) and not isinstance(value.get("tune"), list):
        path = ("tune", *path[2:])  # one phase, written without a list
    dotted = ".".join(str(part) for part in path) or "recipe"
    above = [path[:n] for n in range(len(path), 0, -1)]
    line = next((lines[place] for place in above if place in lines), None)
    given_by = next((overridden[place] for place in above if place in overridden), None)
    if not given_by and path not in lines:  # the override made the mapping that is refused
        given_by = next((text for place, text in overridden.items() if place[: len(path)] == path), None)
    at = f": {dotted}" if given_by and not given_by.startswith("override ") else ""
    where = f"{given_by}{at}" if given_by else f"{name}:{line}: {dotted}" if line else f"{name}: {dotted}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    kind, given = first["type"], first.get("input")
    if kind == "extra_forbidden":
        known = _method_keys(path[:-1], value) or _allowed(Recipe, path[:-1])
        return InputError(f"unknown key {str(path[-1])!r}{more}", where=where, fix=did_you_mean(str(path[-1]), known))
    if kind == "missing":
        return InputError(f"this section or key is missing{more}", where=where, fix="add it")
    if given is None and kind != "value_error":
        return InputError(f"nothing is written here{more}", where=where, fix="give it a value, or leave the key out")
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    message = message[0].lower() + message[1:] if message[1:2].islower() or message[1:2] == " " else message
    message = re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping", message).replace("valid tuple", "list")
    message = message.replace("tuple", "list").replace(" after validation", "")
    if first["loc"] == ("name",) and kind == "string_pattern_mismatch":
        message = "a name has at most 64 letters, digits, dots, dashes and underscores, the first a letter or digit"
    shown = repr(given)
    got = "" if kind == "value_error" or len(shown) > 80 else f", got {shown}"
    return InputError(f"{message}{got}{more}", where=where)


def _method_keys(path: Sequence[str | int], value: Any) -> list[str]:
    """The keys of the method that stands at `path` of the recipe; none if no method stands there."""
    room = {"tune": "tune", "objective": "objectives", "tasks": "evaluate", "select": "data"}.get(
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
    extra += ["weight"] if room == "objectives" and isinstance(path[-1], int) else []
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
