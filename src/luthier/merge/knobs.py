"""Settings that may differ from tensor to tensor: a number, anchors along depth, or either by pattern of names.

    scale: 0.4                                              everywhere
    scale: [0.1, 1.0]                                       0.1 in the first block, 1.0 in the last, linear between
    t: {self_attn: [0, 0.5, 0.3, 0.7, 1], mlp: [1, 0, 0.5], "*": 0.5}

Anchors are spread evenly over the blocks; outside of all blocks the first one holds. Of a mapping the first pattern
that occurs in the tensor's name decides: plain text, or with `*`, `?` or `[...]` a pattern for the whole name. A name
that no pattern meets is an error, so end with "*".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

from luthier.errors import InputError
from luthier.weights.depth import Depth, anchored

Plain = float | tuple[float, ...]
Knob = Any  # a plain value or a mapping of patterns to plain values; checked when built

_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "number"},
        {"type": "array", "items": {"type": "number"}, "minItems": 1},
        {"type": "object", "additionalProperties": {"anyOf": [{"type": "number"}, {"type": "array"}]}},
    ]
}


def _plain(value: Any) -> Plain:
    if isinstance(value, bool) or not isinstance(value, int | float | list | tuple):
        raise ValueError(f"expected a number or a list of numbers along depth, got {value!r}")
    numbers = [value] if isinstance(value, int | float) else list(value)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise ValueError(f"expected a number or a list of numbers along depth, got {value!r}")
    if not all(math.isfinite(n) for n in numbers):
        raise ValueError(f"expected finite numbers, got {value!r}")
    return float(value) if isinstance(value, int | float) else tuple(float(n) for n in numbers)


def _checked(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return _plain(value)
    if not value:
        raise ValueError("expected patterns of names with their values, got an empty mapping")
    return {str(pattern): _plain(plain) for pattern, plain in value.items()}


def _within(low: float, high: float, low_open: bool) -> Any:
    def check(knob: Knob) -> Knob:
        for number in numbers_of(knob):
            if not low <= number <= high or (low_open and number == low):
                bounds = f"{'above' if low_open else 'from'} {low:g} to {high:g}"
                raise ValueError(f"expected numbers {bounds}, got {number:g}")
        return knob

    return check


def knob(low: float = -math.inf, high: float = math.inf, *, low_open: bool = False) -> Any:
    """The type of a setting that may vary, all of whose numbers lie from `low` to `high`."""
    check = AfterValidator(_within(low, high, low_open))
    return Annotated[Any, BeforeValidator(_checked), check, WithJsonSchema(_SCHEMA)]


def value_of(setting: Knob, name: str, depth: Depth | None) -> float:
    """The number that `setting` means for one tensor; `InputError` if none of its patterns meets the name."""
    if isinstance(setting, Mapping):
        for pattern, plain in setting.items():
            if meets(pattern, name):
                return value_of(plain, name, depth)
        raise InputError(f"no pattern meets {name!r}", where=", ".join(setting), fix='end with "*" for all others')
    return setting if isinstance(setting, float) else anchored(setting, depth)


def meets(pattern: str, name: str) -> bool:
    """Whether a pattern meets a tensor's name: plain text occurs in it; with `*`, `?` or `[` it fits the whole name."""
    return fnmatchcase(name, pattern) or (not set(pattern) & set("*?[") and pattern in name)


def numbers_of(setting: Knob) -> list[float]:
    """All numbers that stand in a setting."""
    if isinstance(setting, Mapping):
        return [number for plain in setting.values() for number in numbers_of(plain)]
    return [setting] if isinstance(setting, float) else list(setting)


def constant(setting: Knob) -> float | None:
    """The number if it is the same everywhere, else None."""
    return setting if isinstance(setting, float) else None
