"""Units that may change places: groups of tensor axes, and what becomes of two models' units in one.

A *unit* is a neuron, a channel or a head. A *group* is all axes along which the same units lie: the rows of the layer
that makes them, the vectors of its norm, the columns of all that read them. An axis is a row of *stretches*, each of a
group (so many units of so many elements) or of none:

    fc1.weight axis 0          [64 units of 1]                  fc2.weight axis 1 the same
    o_proj.weight axis 1       [8 heads of 64]
    c_attn.weight axis 1       [12 heads of 64] three times: queries, keys, values
    linear after a flattening  [16 channels of 49]

Two models in one. Of a group some units of A are merged with their partners in B, the others stay apart, so that the
new order is [merged | A only | B only]. `Places` says for each element of a new axis from where in A and where in B it
comes (-1: from nowhere). With U averaging (merged 1/2, alone 1) and V selecting (merged 1, alone 1) a tensor becomes

    W0 = U_A W_A V_A^T + U_B W_B V_B^T        vectors: U_A b_A + U_B b_B

which is the paper's table of blocks: merged <- merged (W_A + W_B) / 2, A <- A and A <- merged W_A, merged <- A W_A / 2,
and A <- B, B <- A are 0. Features are averaged by the same U.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import InputError


class Stretch(NamedTuple):
    """A part of an axis: `units` of `group` with `size` neighbouring elements each; group None: all stays in place."""

    group: str | None
    units: int
    size: int = 1


Axes = dict[str, dict[int, tuple[Stretch, ...]]]  # tensor -> axis -> its stretches; other axes stay in place


@dataclass(frozen=True)
class Group:
    """Units that may be permuted.

    Attributes:
        units: how many.
        family: groups of one family share one ratio.
        depth: number of its block among how many, for ratios along depth.
        rigid: whether it cannot become wider, because a norm over all its units would come out different.
    """

    units: int
    family: str
    depth: tuple[int, int]
    rigid: bool = False


@dataclass(frozen=True)
class Groups:
    """All groups of one architecture.

    Attributes:
        axes: where each group lies.
        head: path of the layer whose outputs are the model's own, if it is known.
    """

    groups: dict[str, Group]
    axes: Axes
    head: str | None = None


class Places(NamedTuple):
    """Of each element of a new axis its place in A and in B, int64, -1 where it has none."""

    a: Tensor
    b: Tensor

    @property
    def width(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class Split:
    """Which units of a group are merged and which stay apart: places in A and in B.

    Attributes:
        merged: (k, 2) int64: a unit of A and its partner in B, in A's order.
        only_a, only_b: (m,) int64; B's in the order of A's.
    """

    merged: Tensor
    only_a: Tensor
    only_b: Tensor

    @property
    def width(self) -> int:
        return len(self.merged) + len(self.only_a) + len(self.only_b)

    def places(self) -> Places:
        """Of the new units, [merged | A only | B only]."""
        nowhere_a, nowhere_b = torch.full_like(self.only_b, -1), torch.full_like(self.only_a, -1)
        return Places(
            torch.cat([self.merged[:, 0], self.only_a, nowhere_a]),
            torch.cat([self.merged[:, 1], nowhere_b, self.only_b]),
        )


def split_of(partner: Tensor, kept: Tensor) -> Split:
    """`partner` (n,) int64: unit i of A goes with unit partner[i] of B; `kept` (n,) bool: i is merged with it."""
    own = torch.arange(len(partner))
    return Split(torch.stack([own[kept], partner[kept]], 1), own[~kept], partner[~kept])


def axis_places(stretches: Sequence[Stretch], splits: Mapping[str, Split]) -> Places:
    """Element by element, of an axis with these stretches."""
    found_a: list[Tensor] = []
    found_b: list[Tensor] = []
    start = 0
    for stretch in stretches:
        if stretch.group is None:
            units = Places(torch.arange(stretch.units), torch.arange(stretch.units))
        else:
            units = splits[stretch.group].places()
        inside = torch.arange(stretch.size)
        for found, side in ((found_a, units.a), (found_b, units.b)):
            elements = start + side[:, None] * stretch.size + inside
            found.append(torch.where(side[:, None] < 0, -1, elements).reshape(-1))
        start += stretch.units * stretch.size
    return Places(torch.cat(found_a), torch.cat(found_b))


def all_places(axes: Axes, splits: Mapping[str, Split]) -> dict[str, dict[int, Places]]:
    """`axis_places` of all axes."""
    return {n: {axis: axis_places(s, splits) for axis, s in of.items()} for n, of in axes.items()}


def taken(tensor: Tensor, places: Tensor, axis: int, factors: Tensor) -> Tensor:
    """`tensor` with the elements at `places` along `axis`, each times its factor; factor 0 where a place is -1."""
    if tensor.shape[axis] == 0:
        return tensor.new_zeros([*tensor.shape[:axis], len(places), *tensor.shape[axis + 1 :]])
    factors = factors.to(tensor.device, tensor.dtype) * (places >= 0).to(tensor.device)
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return tensor.index_select(axis, places.clamp(min=0).to(tensor.device)) * factors.view(shape)


def shares(places: Places) -> tuple[Tensor, Tensor]:
    """The diagonal of U: 1/2 each where an element comes from both models, 1 where it comes from one."""
    both = (places.a >= 0) & (places.b >= 0)
    half = torch.where(both, 0.5, 1.0).double()
    return half * (places.a >= 0), half * (places.b >= 0)


def averaged(a: Tensor, b: Tensor, places: Places | None, axis: int) -> Tensor:
    """U_A a + U_B b along `axis`; plain averages if the axis stays in place (places None)."""
    if places is None:
        return (a + b) / 2
    of_a, of_b = shares(places)
    return taken(a, places.a, axis, of_a) + taken(b, places.b, axis, of_b)


def initial(a: Tensor, b: Tensor, places: Mapping[int, Places], out: int) -> Tensor:
    """W0 of one tensor (float): averaged along its axis `out`, selected along the others that are not in place."""
    if a.ndim == 0:
        return (a + b) / 2
    for axis, where in places.items():
        if axis != out:
            ones = torch.ones(where.width)
            a, b = taken(a, where.a, axis, ones), taken(b, where.b, axis, ones)
    return averaged(a, b, places.get(out), out)


def out_axis(module: nn.Module, name: str, places: Mapping[int, object]) -> int:
    """The axis of parameter `name` of `module` along which its outputs lie."""
    if isinstance(module, Conv1D) and name == "weight":
        return 1
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or not places:
        return 0
    return next(iter(places))


def in_axis(module: nn.Module) -> int:
    """The axis of a layer's weight along which its inputs lie."""
    return 0 if isinstance(module, Conv1D) else 1


@dataclass(frozen=True)
class Pair:
    """The tensors of two models by name, with the module that each belongs to."""

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    owners: Mapping[str, nn.Module] = field(repr=False)

    @classmethod
    def of(cls, a: nn.Module, b: nn.Module) -> Pair:
        modules = dict(a.named_modules())
        state = a.state_dict()
        return cls(state, b.state_dict(), {name: modules[name.rpartition(".")[0]] for name in state})


def merged_tensors(pair: Pair, places: Mapping[str, Mapping[int, Places]]) -> dict[str, Tensor]:
    """W0 of every tensor, in its own type; what is not a floating-point number is A's."""
    found = {}
    for name, tensor in pair.a.items():
        if not tensor.is_floating_point():
            found[name] = tensor.clone()
            continue
        here = places.get(name, {})
        out = out_axis(pair.owners[name], name.rpartition(".")[2], here)
        wide = torch.promote_types(tensor.dtype, torch.float32)
        found[name] = initial(tensor.to(wide), pair.b[name].to(tensor.device, wide), here, out).to(tensor.dtype)
    return found


def given_groups(given: Mapping[str, Sequence[Sequence]], state: Mapping[str, Tensor]) -> Groups:
    """Groups as a user lists them: {group: [(tensor, axis) or (tensor, axis, elements per unit), ...]}.

    An axis that is listed several times is so many stretches in a row, in the order of listing. Raises `InputError`
    for a tensor or axis that does not exist, and if the axes of a group do not agree on the number of units.
    """
    listed: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for group, entries in given.items():
        for entry in entries:
            name, axis, size = entry[0], int(entry[1]), int(entry[2]) if len(entry) > 2 else 1
            if name not in state or not 0 <= axis < state[name].ndim:
                raise InputError(f"there is no axis {axis} of {name!r}", where=f"groups.{group}")
            listed.setdefault((name, axis), []).append((group, size))
    units: dict[str, dict[str, int]] = {group: {} for group in given}
    axes: Axes = {}
    for (name, axis), parts in listed.items():
        length, step = state[name].shape[axis], sum(size for _, size in parts)
        if length % step:
            raise InputError(f"axis {axis} of {name} has {length} elements, which are not units of {step}")
        for group, _ in parts:
            units[group][f"{name}[{axis}]"] = length // step
        axes.setdefault(name, {})[axis] = tuple(Stretch(group, length // step, size) for group, size in parts)
    for group, sizes in units.items():
        if len(set(sizes.values())) != 1:
            told = ", ".join(f"{where} {count}" for where, count in sizes.items()) or "nothing"
            raise InputError(f"its axes differ in units: {told}", where=f"groups.{group}")
    count = len(units)
    groups = {g: Group(next(iter(sizes.values())), g, (n, count)) for n, (g, sizes) in enumerate(units.items())}
    return Groups(groups, axes)
