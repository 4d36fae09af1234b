"""Who matches whom, and how many stay apart.

By activations: similarity of unit i of A and j of B is minus the distance of what they give on the same inputs,

    C[i, j] = - sum over batches of || z_A,i - z_B,j ||_2         z: at the inputs of the layers that read the group

and the matching is the permutation P with the largest sum of C[i, P(i)] (linear assignment). By weights (Git Re-Basin):
C = sum over the group's tensors of W_A W_B^T along the axis, B's other axes in their present order, one group after the
other in random order until nothing gains; running statistics say nothing. Permutations that interact may end in a local
optimum.

Of matched pairs those at or above the r-quantile of similarity are merged: k = n - ceil(r (n - 1)) of n, none at r = 1.
The paper's code keeps all pairs that tie with the quantile; here exactly k are kept, the lower unit of A first, so that
widths depend on the ratio alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.merge.permute.capture import both, channel_rows, layers_of
from luthier.merge.permute.units import Groups, Split, Stretch, axis_places, in_axis, split_of, taken

MEMORY = 2**31  # bytes of similarities held in one pass over the data
GAIN, SWEEPS = 1e-12, 100


@dataclass(frozen=True)
class Matching:
    """Of one group.

    Attributes:
        partner: (n,) int64: unit i of A goes with unit partner[i] of B.
        similarity: (n,) float64 of the matched pairs; higher is more alike.
        benefit: mean of 1 - normalised similarity, in [0, 1]: what there is to gain from keeping units apart.
    """

    partner: Tensor
    similarity: Tensor
    benefit: float


def identity(units: int) -> Matching:
    """Every unit with the one of the same number."""
    return Matching(torch.arange(units), torch.zeros(units, dtype=torch.float64), 0.0)


def assign(similarity: Tensor) -> Tensor:
    """(n, n) -> (n,) int64: the permutation with the largest sum of similarity[i, P(i)]."""
    if not torch.isfinite(similarity).all():
        raise InputError("activations or weights are infinite or not numbers", fix="mend the models first")
    return torch.from_numpy(linear_sum_assignment(similarity.cpu().numpy(), maximize=True)[1]).long()


def separate(ratio: float, units: int) -> int:
    """How many of `units` pairs stay apart: ceil(ratio (n - 1)), all at ratio 1."""
    return units if ratio == 1 else min(math.ceil(ratio * (units - 1) - 1e-9), units - 1)


def split(matching: Matching, ratio: float) -> Split:
    """The units of a group with `ratio` of them not merged: the least alike pairs stay apart."""
    units = len(matching.partner)
    kept = torch.ones(units, dtype=torch.bool)
    order = torch.argsort(matching.similarity, descending=True, stable=True).cpu()
    kept[order[units - separate(ratio, units) :]] = False
    return split_of(matching.partner, kept)


# --- by activations


def units_of(columns: Tensor, stretches: Sequence[Stretch], group: str) -> Tensor:
    """(rows, elements of an axis) -> (units of `group`, rows * elements of a unit)."""
    found, start = [], 0
    for stretch in stretches:
        stop = start + stretch.units * stretch.size
        if stretch.group == group:
            part = columns[:, start:stop].reshape(len(columns), stretch.units, stretch.size)
            found.append(part.transpose(0, 1).reshape(stretch.units, -1))
        start = stop
    return torch.cat(found, 1)


def readers(model: nn.Module, groups: Groups) -> dict[str, list[tuple[str, tuple[Stretch, ...]]]]:
    """Of each group the layers that read it, with the stretches of their inputs."""
    found: dict[str, list[tuple[str, tuple[Stretch, ...]]]] = {name: [] for name in groups.groups}
    for path, module in layers_of(model).items():
        stretches = groups.axes.get(f"{path}.weight", {}).get(in_axis(module), ())
        for name in dict.fromkeys(s.group for s in stretches if s.group is not None):
            found[name].append((path, stretches))
    for name, layers in found.items():
        if not layers:
            raise InputError(f"no linear or convolution reads the units of group {name!r}", where="groups")
    return found


def by_activations(a: nn.Module, b: nn.Module, groups: Groups, batches: Iterable[Any]) -> dict[str, Matching]:
    """Match all groups by what their readers see; as many passes over the data as the memory asks for."""
    reading, found = readers(a, groups), {}
    for names in _portions({name: group.units for name, group in groups.groups.items()}):
        paths = list(dict.fromkeys(path for name in names for path, _ in reading[name]))
        sums: dict[str, Tensor] = {}
        lengths: dict[str, Tensor] = {}
        for seen in both(a, b, batches, paths):
            for name in names:
                distance, length = _distances(a, seen, reading[name], name)
                sums[name] = sums[name].sub_(distance) if name in sums else -distance
                lengths[name] = lengths[name] + length if name in lengths else length
        for name in names:
            partner = assign(sums[name])
            own = torch.arange(len(partner), device=sums[name].device)
            similarity = sums[name][own, partner.to(own.device)]
            scale = lengths[name][0] + lengths[name][1][partner.to(own.device)]
            apart = torch.where(scale > 0, -similarity / scale, 0.0)  # in [0, 1], by the triangle inequality
            found[name] = Matching(partner, similarity.cpu(), float(apart.mean()))
    return found


def _distances(
    model: nn.Module, seen: Mapping[str, Any], reading: Sequence[tuple[str, tuple[Stretch, ...]]], group: str
) -> tuple[Tensor, Tensor]:
    """(n, n) distances of a batch, and (2, n) lengths of each model's units, float64."""
    squares: Tensor | None = None
    lengths: Tensor | None = None
    for path, stretches in reading:
        module = model.get_submodule(path)
        for call in seen.get(path, []):
            za, zb = (
                units_of(channel_rows(module, side), stretches, group).double() for side in (call.a_in, call.b_in)
            )
            own = torch.stack([za.square().sum(1), zb.square().sum(1)])
            far = (own[0][:, None] + own[1][None] - 2 * za @ zb.T).clamp_(min=0)
            squares = far if squares is None else squares.add_(far)
            lengths = own if lengths is None else lengths + own
    if squares is None or lengths is None:
        raise InputError(f"no layer that reads group {group!r} is used on this data", where="groups")
    return squares.sqrt_(), lengths.sqrt()


def _portions(units: Mapping[str, int]) -> list[list[str]]:
    """Groups in portions whose similarities fit the memory; at least one group each."""
    portions: list[list[str]] = []
    filled = 0
    for name, count in units.items():
        size = 8 * count**2
        if not portions or filled + size > MEMORY:
            portions.append([])
            filled = 0
        portions[-1].append(name)
        filled += size
    return portions


# --- by weights


def by_weights(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], groups: Groups, generator: torch.Generator
) -> dict[str, Matching]:
    """Match all groups by coordinate ascent on the inner products of their tensors."""
    splits = {name: split(identity(group.units), 0.0) for name, group in groups.groups.items()}
    names = list(splits)
    for _ in range(SWEEPS):
        gained = False
        for number in torch.randperm(len(names), generator=generator).tolist():
            similarity = _products(a, b, groups, splits, names[number])[0]
            partner, before = assign(similarity), splits[names[number]].merged[:, 1]
            own = torch.arange(len(partner))
            gain = similarity[own, partner].sum() - similarity[own, before].sum()
            if gain > GAIN:
                splits[names[number]] = split_of(partner, torch.ones(len(partner), dtype=torch.bool))
                gained = True
        if not gained:
            break
    found = {}
    for name in names:
        similarity, lengths = _products(a, b, groups, splits, name)
        partner = splits[name].merged[:, 1]
        matched = similarity[torch.arange(len(partner)), partner]
        scale = (lengths[0] * lengths[1][partner]).sqrt()
        cosine = torch.where(scale > 0, matched / scale, 1.0).clamp(0, 1)
        found[name] = Matching(partner, matched, float((1 - cosine).mean()))
    return found


def _products(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], groups: Groups, splits: Mapping[str, Split], group: str
) -> tuple[Tensor, Tensor]:
    """(n, n) inner products of the units of `group` and (2, n) squared lengths, over all its tensors, float64."""
    units = groups.groups[group].units
    total, lengths = torch.zeros(units, units, dtype=torch.float64), torch.zeros(2, units, dtype=torch.float64)
    for name, axes in groups.axes.items():
        if name.endswith(("running_mean", "running_var")):
            continue
        for axis, stretches in axes.items():
            if all(s.group != group for s in stretches):
                continue
            other = b[name].cpu().double()
            for beside, theirs in axes.items():
                if beside != axis:
                    places = axis_places(theirs, splits)
                    other = taken(other, places.b, beside, torch.ones(places.width))
            sides = [
                units_of(tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis]), stretches, group)
                for tensor in (a[name].cpu().double(), other)
            ]
            total += sides[0] @ sides[1].T
            lengths += torch.stack([side.square().sum(1) for side in sides])
    return total, lengths
