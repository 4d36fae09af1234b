"""From the text of a recipe to plain values: reading, YAML with line numbers, and overrides such as `tune.rank=8`.

Nothing here knows what a recipe may say; `luthier.pipeline.recipe` checks that. What is refused here is text that has
no single meaning: other encodings than UTF-8, broken YAML, a key that stands twice, an alias inside what it names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from luthier.errors import InputError, did_you_mean

# The place of a value in the recipe, such as ("tune", 0, "rank"), and the line (from 1) on which it stands.
Place = tuple[str | int, ...]
Lines = dict[Place, int]

# A recipe has a few hundred values; aliases of aliases can stand for billions in a few lines.
MOST_VALUES = 1_000_000


def read_text(source: str | Path, packaged: Mapping[str, str]) -> tuple[str, str]:
    """(name for errors, text) of the file `source`, or of the packaged recipe of that name if no such file exists."""
    path = Path(source)
    try:
        if not path.exists() and str(source) in packaged:
            return f"{source} (packaged)", packaged[str(source)]
        if not str(source).strip() or not path.is_file():
            folder = path.is_dir() and bool(str(source).strip())
            near = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() and not folder else []
            what = "this is a folder, not a recipe" if folder else "there is no such recipe"
            raise InputError(what, where=str(source) or "''", fix=did_you_mean(path.name, [*packaged, *near]))
        return str(path), path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start} is not UTF-8", where=str(path), fix="save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"the recipe cannot be read: {error.strerror}", where=str(path)[:200]) from None


def parse(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """The mapping in a YAML text, and the line of each of its values; `name` stands in errors."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            raise InputError("the recipe is empty", where=name, fix="`luthier recipes` lists examples")
        if not isinstance(node, yaml.MappingNode):
            raise InputError("a recipe is a mapping of sections such as data, model, tune", where=f"{name}:1")
        lines: Lines = {}
        _walk(node, (), name, lines, {}, set())
        return yaml.safe_load(text), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise InputError(f"not valid YAML: {error.problem}", where=where) from None
    except RecursionError:
        raise InputError("not valid YAML: it is nested too deeply", where=name) from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"not valid YAML: {str(error).splitlines()[0]}", where=name) from None


def _walk(node: yaml.Node, place: Place, name: str, lines: Lines, sizes: dict[int, int], above: set[int]) -> int:
    """Note the line of everything below `node`, refusing what has no single meaning; returns how many values it is."""
    here = f"{name}:{node.start_mark.line + 1}"
    if id(node) in above:
        raise InputError("an alias (*) stands inside what it names", where=here, fix="write the value out")
    if id(node) in sizes:
        return sizes[id(node)]
    size, inside = 1, above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise InputError("a key is a plain word, not a list or a mapping", where=f"{name}:{line}")
            if key.value in seen:
                raise InputError(
                    f"the key {key.value!r} stands here a second time", where=f"{name}:{line}", fix="remove one"
                )
            seen.add(key.value)
            lines[(*place, key.value)] = line
            size += _walk(value, (*place, key.value), name, lines, sizes, inside)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*place, index)] = item.start_mark.line + 1
            size += _walk(item, (*place, index), name, lines, sizes, inside)
    if size > MOST_VALUES:
        raise InputError(f"the aliases (*) stand for more than {MOST_VALUES:,} values", where=here)
    sizes[id(node)] = size
    return size


def plain(value: Any, place: str = "recipe") -> Any:
    """A mapping made in Python as a recipe file would give it: dicts, lists and plain values, nothing shared."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, Mapping):
        return {key: plain(inner, f"{place}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, f"{place}.{index}") for index, inner in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise InputError(f"a recipe holds numbers, words, lists and mappings, got {type(value).__name__}", where=place)


def override(recipe: dict[str, Any], text: str) -> Place:
    """Set one dotted key of `recipe` in place, `a.b=value` with the value in YAML; returns the place that was set."""
    dotted, sign, written = text.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not sign or not all(keys):
        raise InputError(f"{text!r} is not an override", fix="write section.key=value, such as tune.rank=8")
    try:
        new = parse(f"value: {written}" if written.strip() else "value:", text)[0]["value"]
    except (InputError, KeyError):
        fix = "put it in quotes"
        raise InputError(f"the value of {dotted} is not valid YAML: {written!r}", where=text, fix=fix) from None
    inside, at, place = locate(recipe, phase_keys(recipe, keys), text)
    inside[at] = new
    return place


def phase_keys(recipe: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """`keys` for what stands in `recipe`: one phase of tuning may be written with a list or without, and is phase 0 and
    phase -1 in both."""
    phases = recipe.get("tune")
    if keys[0] == "tune" and len(keys) > 1:
        numbered = keys[1] in ("0", "-1")
        if isinstance(phases, dict) and numbered and len(keys) > 2:
            return ["tune", *keys[2:]]
        if isinstance(phases, list) and len(phases) == 1 and not re.fullmatch(r"-?\d+", keys[1]):
            return ["tune", "0", *keys[1:]]
    return list(keys)


def locate(recipe: dict[str, Any], keys: Sequence[str], text: str) -> tuple[Any, Any, Place]:
    """(mapping or list, key or number in it, place) of the value that `keys` name; mappings above it are made.

    Places in a list are numbered from 0, and from -1 backwards. Raises `InputError` at `text` if there is no such one.
    """
    value: Any = recipe
    place: Place = ()
    for number, key in enumerate(keys):
        index: Any = key
        so_far = ".".join(keys[:number])
        if isinstance(value, list):
            index = int(key) if re.fullmatch(r"-?[0-9]+", key) else len(value)
            if not -len(value) <= index < len(value):
                what = f"{so_far} is a list of {len(value)}, so {key!r} names nothing in it"
                fix = f"use a number below {len(value)}" if value else f"set all of {so_far}"
                raise InputError(what, where=text, fix=fix)
            index %= len(value)
        elif not isinstance(value, dict):
            raise InputError(f"{so_far} is a plain value and has no key {key!r}", where=text)
        place = (*place, index)
        if number < len(keys) - 1:
            if isinstance(value, dict) and value.get(index) is None:
                value[index] = {}
            value = value[index]
    return value, index, place
