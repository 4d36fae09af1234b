"""The one base class of all methods, their discovery by name, and the catalogue of the papers.

A method is a small settings object with one verb. Its class is at once the settings (typed, defaulted, checked when
built), the recipe entry (`{method: lora, rank: 8}`) and the catalogue entry (`paper`). Rooms subclass `Method` once
to add their verb (`Tuning.attach`, `Objective.loss`, `Task.grade`), and each method of a room subclasses that.

A room lists its methods in one table of import strings, so that asking for the names imports nothing heavy:

    # luthier/tune/__init__.py
    METHODS = {"full": "luthier.tune.full:Full", "lora": "luthier.tune.lora:Lora"}

Names are looked up once, here, at the edge; inner code is handed the object and never compares strings.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, WithJsonSchema

from luthier.errors import InputError, did_you_mean

# Rooms that hold methods, in the order of a run. Rooms that are not built yet have no folder and no methods.
ROOMS = (
    "data",
    "tune",
    "objectives",
    "rollout",
    "train",
    "merge",
    "decode",
    "evaluate",
    "analyze",
    "federate",
    "serve",
)


class Method(BaseModel):
    """Settings of one method. Frozen, unknown keys refused, ranges checked when built."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    room: ClassVar[str]
    paper: ClassVar[int | None] = None
    method: str


def table(room: str) -> dict[str, str]:
    """Names of a room's methods and where each one lives (`module:Class`); empty for a room not built yet."""
    try:
        module = importlib.import_module(f"luthier.{room}")
    except ModuleNotFoundError as error:
        if error.name == f"luthier.{room}":
            return {}
        raise
    return dict(getattr(module, "METHODS", {}))


def find(room: str, name: str) -> type[Method]:
    """The class of method `name` in `room`; `InputError` with the nearest names if there is none."""
    names = table(room)
    if name not in names:
        raise InputError(f"unknown method {name!r} in {room}", fix=did_you_mean(str(name), names))
    module, _, attribute = names[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(room: str, settings: Any) -> Method:
    """The method that `settings` describes: a ready object, a bare name, or a mapping with the key `method`."""
    if isinstance(settings, Method):
        return settings
    if isinstance(settings, str):
        settings = {"method": settings}
    if not isinstance(settings, Mapping):
        raise ValueError(f"expected a method of {room} such as {{method: name}}, got {type(settings).__name__}")
    name = settings.get("method")
    if not isinstance(name, str):
        raise ValueError(f"no method is named; {did_you_mean('', table(room))}")
    try:
        kind = find(room, name)
    except InputError as error:
        raise ValueError(str(error).rstrip(".")) from None
    return kind.model_validate(dict(settings))


def field(room: str) -> Any:
    """The type of a recipe field that holds one method of `room`: validated by name, serialised with all its keys."""
    schema = {"type": "object", "properties": {"method": {"type": "string"}}, "required": ["method"], "x-room": room}
    return SerializeAsAny[Annotated[Method, BeforeValidator(lambda v: build(room, v)), WithJsonSchema(schema)]]


class Paper(BaseModel):
    """One row of the catalogue of the 91 papers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    name: str
    title: str
    room: str
    kind: str
    summary: str
    reference: str
    status: str  # "ready" or "planned"


@cache
def catalogue() -> tuple[Paper, ...]:
    """All papers, by number. One file holds them: `luthier/catalogue.yaml`."""
    text = resources.files("luthier").joinpath("catalogue.yaml").read_text(encoding="utf-8")
    return tuple(Paper.model_validate(row) for row in yaml.safe_load(text))
