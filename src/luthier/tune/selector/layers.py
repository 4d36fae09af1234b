"""A scope of linears: a range of layers times names of modules.

    25%:50%      layers floor(N 25 / 100) to floor(N 50 / 100) - 1 of N, counted from 0
    bottom2      the same range by the name that CoFiTune gives it (`LAYERS`)
    (3, 5)       these

The blocks of an encoder and a decoder form one stack, encoder first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from luthier.errors import InputError, did_you_mean
from luthier.models.topology import Topology
from luthier.tune.selector.tensors import Unit
from luthier.tune.selector.units import BlockUnits, find_linears, units_of

LAYERS = {
    "bottom1": "0%:25%",
    "bottom2": "25%:50%",
    "middle": "50%:75%",
    "top": "75%:100%",
    "bottom_plus": "0%:50%",
    "middle_plus": "25%:75%",
    "top_plus": "50%:100%",
}
_RANGE = re.compile(r"(\d+(?:\.\d+)?)%:(\d+(?:\.\d+)?)%")


def percent(text: str) -> tuple[Fraction, Fraction]:
    """Both ends of a range such as `25%:50%`, or of one with a name, as shares of all layers."""
    match = _RANGE.fullmatch(LAYERS.get(text.replace("-", "_"), text))
    if match is None:
        raise ValueError(f"layers {text!r} is no range such as '25%:50%'; {did_you_mean(text, LAYERS)}")
    first, last = (Fraction(number) / 100 for number in match.groups())
    if not first < last <= 1:
        raise ValueError(f"layers {text!r} must rise, and end at 100% at most")
    return first, last


def layers_of(layers: str | tuple[int, ...], count: int) -> list[int]:
    """Numbers of the blocks of `count` that `layers` means, ascending; `InputError` if there is none, or no such."""
    if isinstance(layers, str):
        first, last = (math.floor(count * share) for share in percent(layers))
        if first == last:
            raise InputError(
                f"{layers!r} of {count} layers is not one layer", where="tune.layers", fix="widen it, or give numbers"
            )
        return list(range(first, last))
    if max(layers) >= count:
        raise InputError(f"there is no layer {max(layers)}: the model has {count}, from 0", where="tune.layers")
    return sorted(layers)


@dataclass(frozen=True)
class LayersByModules:
    """Linears with their biases: those that the names fit, in these layers."""

    layers: str | tuple[int, ...]
    modules: tuple[str, ...]

    def linears(
        self, model: nn.Module, topology: Topology, names: Sequence[str] | None = None, where: str = "tune.modules"
    ) -> list[tuple[BlockUnits, str]]:
        of = units_of(model, topology)
        return find_linears([of[i] for i in layers_of(self.layers, len(of))], names or self.modules, where)

    def units(self, model: nn.Module, topology: Topology) -> list[Unit]:
        return [
            Unit(frozenset(parameters_of(model, path)), path.rpartition(".")[2], units.block.index)
            for units, path in self.linears(model, topology)
        ]

    def names(self, model: nn.Module, topology: Topology) -> list[str]:
        return [n for _, path in self.linears(model, topology) for n in parameters_of(model, path)]

    def always(self, model: nn.Module, topology: Topology) -> set[str]:
        return set()

    def __str__(self) -> str:
        layers = self.layers if isinstance(self.layers, str) else ", ".join(map(str, self.layers))
        return f"layers {layers} x {', '.join(self.modules)}"


@dataclass(frozen=True)
class Masked:
    """Of the linears that move those that names fit; all if None."""

    moving: LayersByModules
    names: tuple[str, ...] | None

    def linears(self, model: nn.Module, topology: Topology) -> list[tuple[BlockUnits, str]]:
        moving = self.moving.linears(model, topology)
        chosen: set[str] = set()
        for name in self.names or ():
            named = {path for _, path in self.moving.linears(model, topology, [name], "tune.soft_mask")}
            if not named & {path for _, path in moving}:
                raise InputError(
                    f"{name!r} is to be held back but does not move at all",
                    where="tune.soft_mask",
                    fix="add it to modules, or leave it out here",
                )
            chosen |= named
        return [(units, path) for units, path in moving if self.names is None or path in chosen]

    def __str__(self) -> str:
        return "the tensors chosen first" + (f" with {', '.join(self.names)}" if self.names else "")


def parameters_of(model: nn.Module, path: str) -> list[str]:
    """Names of a linear's own parameters."""
    return [f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters(recurse=False)]
