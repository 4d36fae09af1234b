"""What being wider costs, and which groups are worth it.

A layer whose inputs are wider by r1 and whose outputs by r2 costs, cross blocks being 0,

    base ((1 + r1)(1 + r2) - 2 r1 r2)        one-sided: base (1 + r)

The paper maximises the summed benefit of the ratios under a budget with a solver for quadratic programs. Here families
of groups are widened greedily, the one with the most benefit per cost first, as far as the budget goes. (The cost of
both sides is less than that of one after the other, so what was chosen first makes its neighbours cheaper.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from luthier.merge.permute.capture import both, channel_rows, layers_of
from luthier.merge.permute.matching import Matching
from luthier.merge.permute.units import Groups, Stretch, in_axis


@dataclass(frozen=True)
class Cost:
    """One layer: multiplications at the original width, and for each side (group, share of the axis) parts."""

    base: float
    inputs: tuple[tuple[str, float], ...]
    outputs: tuple[tuple[str, float], ...]

    def at(self, wider: Mapping[str, float]) -> float:
        """With a share `wider` of units apart in each group."""
        r1 = sum(share * wider[group] for group, share in self.inputs)
        r2 = sum(share * wider[group] for group, share in self.outputs)
        return self.base * ((1 + r1) * (1 + r2) - 2 * r1 * r2)


def costs(a: nn.Module, b: nn.Module, groups: Groups, batches: Iterable[Any]) -> list[Cost]:
    """Of all layers that run on the first batch, per batch."""
    layers = layers_of(a)
    found = []
    for path, calls in next(iter(both(a, b, batches, list(layers)))).items():
        module: Any = layers[path]
        axes = groups.axes.get(f"{path}.weight", {})
        sides = [_parts(axes.get(axis, ())) for axis in (in_axis(module), 1 - in_axis(module))]
        positions = sum(len(channel_rows(module, call.a_out)) for call in calls)
        found.append(Cost(positions * module.weight.numel(), *sides))
    return found


def _parts(stretches: tuple[Stretch, ...]) -> tuple[tuple[str, float], ...]:
    total = sum(s.units * s.size for s in stretches)
    return tuple((s.group, s.units * s.size / total) for s in stretches if s.group is not None)


def total(found: list[Cost], wider: Mapping[str, float]) -> float:
    return sum(cost.at(wider) for cost in found)


def relative(found: list[Cost], wider: Mapping[str, float]) -> float:
    """The cost of all layers over that at the original width."""
    return total(found, wider) / max(total(found, dict.fromkeys(wider, 0.0)), 1.0)


def ratios(
    groups: Groups, matchings: Mapping[str, Matching], found: list[Cost], budget: float, families: list[str]
) -> dict[str, float]:
    """The ratio of each group, so that all layers cost at most `budget` times what they cost at ratio 0.

    Args:
        families: those that may become wider; the groups of a family get one ratio.
    """
    names = groups.groups
    apart = dict.fromkeys(names, 0)
    limit = budget * total(found, dict.fromkeys(names, 0.0)) * (1 + 1e-12)

    def cost(family: str, share: float) -> float:
        return total(found, _wider(groups, apart | _raised(groups, family, share)))

    left = list(families)
    while left:
        now = total(found, _wider(groups, apart))

        def worth(family: str, now: float = now) -> float:
            benefit = sum(matchings[g].benefit for g in names if names[g].family == family)
            return benefit / max(cost(family, 1.0) - now, 1e-30)

        best = max(left, key=worth)
        left.remove(best)
        units = max(names[g].units for g in names if names[g].family == best)
        # Most pairs apart that the budget allows; the cost grows with each, so bisection finds them.
        low, high = 0, units
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(best, middle / units) <= limit else (low, middle - 1)
        apart |= _raised(groups, best, low / units)
        if low < units:
            break
    return {g: _ratio(apart[g], names[g].units) for g in names}


def _raised(groups: Groups, family: str, share: float) -> dict[str, int]:
    return {g: int(share * group.units + 1e-9) for g, group in groups.groups.items() if group.family == family}


def _wider(groups: Groups, apart: Mapping[str, int]) -> dict[str, float]:
    return {g: apart[g] / group.units for g, group in groups.groups.items()}


def _ratio(apart: int, units: int) -> float:
    """A ratio at which exactly `apart` pairs stay apart (`matching.separate`)."""
    return 0.0 if apart == 0 else 1.0 if apart == units else (apart - 0.5) / (units - 1)
