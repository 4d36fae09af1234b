"""Read a merge configuration of mergekit: the same models, merged by the same rule, through `lt.merge`.

    plan = read_mergekit("config.yaml")
    lt.merge(plan.method, base=plan.base, models=plan.models, out="merged")

Understood are `slerp`, `linear`, `task_arithmetic`, `ties` and `breadcrumbs`, over whole models (`models:`, or one
slice that takes all layers), with parameters for all models or for each, as numbers, gradients along depth, and
filters. What has no counterpart here is refused by name; what does not change the outcome's numbers is left out and
told in `notes`.

Defaults are mergekit's: `normalize` is true for linear and ties, `lambda` 1, `density` 1 (per tensor), `gamma` 0.01.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from luthier.errors import InputError, did_you_mean
from luthier.merge.base import Merge
from luthier.methods import build
from luthier.models.checkpoint import read_json

_TOP = {"merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source"}
_TAKES = {
    "slerp": {"t"},
    "linear": {"weight", "normalize"},
    "task_arithmetic": {"weight", "normalize", "lambda", "int8_mask"},
    "ties": {"weight", "normalize", "lambda", "int8_mask", "density"},
    "breadcrumbs": {"weight", "normalize", "lambda", "int8_mask", "density", "gamma"},
}


@dataclass(frozen=True)
class MergekitPlan:
    """What a configuration asks for.

    Attributes:
        method: the merge with its settings.
        base: path or name of the base; None if the method has none.
        models: of the models, in order, without the base (for slerp with it, where it is listed).
        notes: what of the configuration was left out, and why that does no harm.
    """

    method: Merge
    base: str | None
    models: list[str]
    notes: list[str]


def read_mergekit(source: Path | str | Mapping[str, Any]) -> MergekitPlan:
    """The merge that a configuration describes: a file's path, or its content as a mapping.

    Raises `InputError` that names what is not understood.
    """
    where = str(source) if not isinstance(source, Mapping) else "mergekit configuration"
    config = _content(source, where)
    unknown = sorted(set(config) - _TOP)
    if unknown:
        raise InputError(f"{', '.join(unknown)} is not understood", where=where, fix="use mergekit itself for this one")
    name = config.get("merge_method")
    if name not in _READERS:
        raise InputError(f"merge_method {name!r} is not understood", where=where, fix=did_you_mean(str(name), _READERS))
    entries, shared = _entries(config, where)
    base = config.get("base_model")
    reading = _Reading(where, entries, shared, None if base is None else _path(base, where))
    reading.check_parameters(name)
    settings, base, models = _READERS[name](reading)
    notes = [*_notes(config), *reading.notes]
    if config.get("tokenizer_source") not in (None, "base", base):
        raise InputError("tokenizer_source is not understood", where=where, fix="leave it out, or name the base")
    try:
        method = build("merge", settings)
    except ValidationError as error:
        said = "; ".join(problem["msg"] for problem in error.errors())
        raise InputError(f"{name}: {said}", where=where) from None
    assert isinstance(method, Merge)
    return MergekitPlan(method, base, models, notes)


@dataclass
class _Reading:
    """The models of a configuration with their parameters, and those for all of them."""

    where: str
    entries: list[tuple[str, Mapping[str, Any]]]
    shared: Mapping[str, Any]
    base: str | None

    def __post_init__(self) -> None:
        self.notes: list[str] = []

    def check_parameters(self, method: str) -> None:
        given = {key for parameters in (self.shared, *(p for _, p in self.entries)) for key in parameters}
        odd = sorted(given - _TAKES[method])
        if odd:
            raise InputError(f"the parameter {', '.join(odd)} is not understood for {method}", where=self.where)
        if "int8_mask" in given:
            self.notes.append("int8_mask: only how mergekit stores its masks")

    def of_all(self, key: str, default: Any = None) -> Any:
        """A parameter that is the same for all models."""
        found = knob_of(self.shared[key], f"{self.where}: {key}") if key in self.shared else default
        if found is None:
            raise InputError(f"{key} is needed and not given", where=self.where)
        return found

    def of_each(self, key: str, names: Sequence[str], default: Any = None) -> list[Any]:
        """A parameter for each model: its own, else that for all."""
        found = []
        for name in names:
            own = next(parameters for model, parameters in self.entries if model == name)
            given = own.get(key, self.shared.get(key, default))
            if given is None:
                raise InputError(f"{key} of {name} is needed and not given", where=self.where)
            found.append(knob_of(given, f"{self.where}: {key} of {name}"))
        return found

    def constant(self, key: str, names: Sequence[str], default: float | None = None) -> float:
        """A number that has to be the same for all models and layers."""
        found = self.of_each(key, names, default)
        if not found or not isinstance(found[0], float) or any(value != found[0] for value in found):
            raise InputError(f"{key} has to be one number for all models and layers here", where=self.where)
        return found[0]

    def flag(self, key: str, default: bool) -> bool:
        given = self.shared.get(key, default)
        if not isinstance(given, bool):
            raise InputError(f"{key} must be true or false, got {given!r}", where=self.where)
        return given

    @property
    def others(self) -> list[str]:
        """The models without the base."""
        names = [name for name, _ in self.entries if name != self.base]
        if len(set(names)) < len(names):
            raise InputError("a model is listed twice", where=self.where)
        return names

    def with_base(self) -> str:
        if self.base is None:
            raise InputError("base_model is needed and not given", where=self.where)
        return self.base


Read = tuple[dict[str, Any], str | None, list[str]]


def _slerp(reading: _Reading) -> Read:
    return {"method": "slerp", "t": reading.of_all("t")}, reading.with_base(), [name for name, _ in reading.entries]


def _linear(reading: _Reading) -> Read:
    names = [name for name, _ in reading.entries]
    weights = tuple(reading.of_each("weight", names))
    return {"method": "linear", "weights": weights, "normalise": reading.flag("normalize", True)}, None, names


def _task_arithmetic(reading: _Reading) -> Read:
    names = reading.others
    weights = reading.of_each("weight", names)
    if reading.flag("normalize", False):
        if not all(isinstance(weight, float) for weight in weights):
            fix = "leave normalize out, or give constant weights"
            raise InputError("normalize of weights along depth is not understood", where=reading.where, fix=fix)
        total = sum(weights)
        weights = [weight / total if abs(total) >= 1e-8 else weight for weight in weights]
    scale = reading.of_all("lambda", 1.0)
    return {"method": "task-arithmetic", "scale": scale, "weights": tuple(weights)}, reading.with_base(), names


def _ties(reading: _Reading) -> Read:
    names = reading.others
    settings = {
        "method": "ties",
        "scope": "tensor",
        "density": reading.constant("density", names, 1.0),
        "weights": tuple(reading.of_each("weight", names)),
        "agg": "mean" if reading.flag("normalize", True) else "sum",
        "scale": reading.of_all("lambda", 1.0),
    }
    return settings, reading.with_base(), names


def _breadcrumbs(reading: _Reading) -> Read:
    names = reading.others
    if reading.flag("normalize", False):
        raise InputError("normalize of breadcrumbs is not understood", where=reading.where, fix="leave it out")
    weight, scale = reading.constant("weight", names), reading.of_all("lambda", 1.0)
    if not isinstance(scale, float):
        raise InputError("lambda along depth is not understood", where=reading.where, fix="give a number")
    settings = {
        "method": "breadcrumbs",
        "density": reading.constant("density", names, 1.0),
        "drop_top": reading.constant("gamma", names, 0.01),
        "scale": weight * scale,
    }
    return settings, reading.with_base(), names


_READERS: dict[str, Callable[[_Reading], Read]] = {
    "breadcrumbs": _breadcrumbs,
    "linear": _linear,
    "slerp": _slerp,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
}


def knob_of(setting: Any, where: str) -> Any:
    """A parameter of mergekit as a setting that may vary: a number, anchors, or a mapping of patterns to either."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting, Sequence) and setting and all(isinstance(item, Mapping) for item in setting):
        found: dict[str, Any] = {}
        for item in setting:
            text = str(item.get("filter") or "*")
            if text != "*" and set(text) & set("*?["):
                raise InputError(f"the filter {text!r} holds a sign that would be a pattern here", where=where)
            found.setdefault(text, _numbers(item.get("value"), where))
        return found
    return _numbers(setting, where)


def _numbers(value: Any, where: str) -> float | tuple[float, ...]:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value) if not isinstance(value, list | tuple) else tuple(float(number) for number in value)
    except (TypeError, ValueError):
        raise InputError(f"expected a number or a list of them, got {value!r}", where=where) from None


def _content(source: Path | str | Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(source, Mapping):
        try:
            source = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"cannot be read as YAML ({error})", where=where) from None
    if not isinstance(source, Mapping):
        raise InputError("expected a mapping with merge_method", where=where)
    return dict(source)


def _entries(config: Mapping[str, Any], where: str) -> tuple[list[tuple[str, Mapping[str, Any]]], Mapping[str, Any]]:
    """Models with their parameters, and the parameters for all, from `models` or from one slice of all layers."""
    shared = dict(config.get("parameters") or {})
    listed = config.get("models")
    if listed is None:
        slices = config.get("slices") or []
        if len(slices) != 1:
            fix = "only merges of whole models are understood: models, or one slice"
            raise InputError(f"there are {len(slices)} slices and no models", where=where, fix=fix)
        listed = slices[0].get("sources") or []
        shared |= slices[0].get("parameters") or {}
        ranges = {tuple(source.get("layer_range") or ()) for source in listed}
        if len(ranges) > 1 or any(len(span) != 2 or span[0] != 0 for span in ranges):
            raise InputError("the slice does not take the same layers, from 0, of all models", where=where)
        for (_, stop), source in ((span, source) for span in ranges for source in listed):
            _all_layers(_path(source["model"], where), stop, where)
    if not listed:
        raise InputError("there is no model", where=where)
    return [(_path(entry.get("model"), where), entry.get("parameters") or {}) for entry in listed], shared


def _all_layers(model: str, stop: int, where: str) -> None:
    """`InputError` if the model lies here and has another number of layers."""
    path = Path(model) / "config.json"
    count = read_json(path).get("num_hidden_layers", stop) if path.is_file() else stop
    if count != stop:
        raise InputError(f"the slice takes {stop} of {count} layers of {model}", where=where, fix="take all of them")


def _path(model: Any, where: str) -> str:
    """Path or name of a model reference."""
    if isinstance(model, Mapping) and set(model) == {"model"}:
        return _path(model["model"], where)
    if isinstance(model, Mapping) and set(model) == {"path"}:
        return _path(model["path"], where)
    if not isinstance(model, str) or "+" in model:
        fix = "name a model's folder; an adapter is a model of its own here, on the base"
        raise InputError(f"the model {model!r} is not understood", where=where, fix=fix)
    return model


def _notes(config: Mapping[str, Any]) -> list[str]:
    kept = "the outcome has the types of the base, or of the first model"
    return [f"{key}: {config[key]}: {kept}" for key in ("dtype", "out_dtype") if config.get(key)]
