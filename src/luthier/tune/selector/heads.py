"""Heads and feed-forward neurons as parts of a block: which rows and columns of which weights belong to each.

A part is gone when the columns of the projection behind it are zero; the rows in front of it are then of no use either.
A `Unit` names both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.models.structure import unwrap, walk
from luthier.models.topology import Block
from luthier.tune.targets import attention_roles


@dataclass(frozen=True)
class Slice:
    """Rows (`outputs`) or columns (`inputs`) `start` to `stop` of the linear at `path`."""

    path: str
    start: int
    stop: int
    inputs: bool = False


@dataclass(frozen=True)
class Unit:
    """A head, or a neuron of a feed-forward.

    Attributes:
        own: what goes with it: what makes its activations, and what reads them.
        shared: what other units use too (the keys and values of grouped heads); it goes with the last of them.
        scored: what it is judged by, each with a factor.
    """

    own: tuple[Slice, ...]
    shared: tuple[Slice, ...]
    scored: tuple[tuple[Slice, float], ...]


def heads(base: nn.Module, block: Block) -> list[list[Unit]]:
    """The heads of each attention of a block, in order. A key and value that several queries use are shared.

    Raises `InputError` if query, key, value and output are no linears of their own, or do not divide into heads.
    """
    found = []
    for root, roles in zip(block.attention_modules, attention_roles(block), strict=True):
        if len(roles) < 4:
            raise InputError(
                f"{root} has no separate query, key, value and output, so its heads cannot be told apart",
                where="tune.mode",
                fix="take mode: unstructured",
            )
        wide, narrow = _features(base, roles["query"])[0], _features(base, roles["key"])[0]
        width = _head_width(base, root, wide)
        if wide % width or narrow % width or (wide // width) % (narrow // width):
            raise InputError(
                f"{root} has {wide} outputs for queries and {narrow} for keys, "
                f"which do not divide into heads of {width}",
                where="tune.mode",
                fix="take mode: unstructured",
            )
        count, users = wide // width, wide // narrow
        units = []
        for head in range(count):
            own, group = (head * width, (head + 1) * width), head // users
            theirs = (group * width, (group + 1) * width)
            query, output = Slice(roles["query"], *own), Slice(roles["output"], *own, inputs=True)
            key, value = Slice(roles["key"], *theirs), Slice(roles["value"], *theirs)
            units.append(Unit((query, output), (key, value), ((query, 1.0), (value, 1.0 / users))))
        found.append(units)
    return found


def neurons(base: nn.Module, block: Block) -> list[Unit]:
    """The hidden neurons of a block's dense feed-forward, in order.

    The last linear reads them, all others make them. Raises `InputError` where that is not so (experts, fused gates).
    """
    *front, behind = block.feed_forward or ("",)
    count = _features(base, behind)[1] if front else 0
    if not front or block.experts.count or any(_features(base, path)[0] != count for path in front):
        raise InputError(
            f"the feed-forward of {block.path} is not one linear behind others as wide as its input",
            where="tune.mode",
            fix="take mode: unstructured",
        )
    units = []
    for n in range(count):
        rows = tuple(Slice(path, n, n + 1) for path in front)
        units.append(Unit((*rows, Slice(behind, n, n + 1, inputs=True)), (), tuple((one, 1.0) for one in rows)))
    return units


def without(base: nn.Module, units: list[Unit], gone: set[int]) -> dict[str, Tensor]:
    """Masks (bool, by name of weight and bias, True stays) of a group of units without those in `gone`.

    A shared slice goes only with the last of its users.
    """
    masks: dict[str, Tensor] = {}
    stay = {one for n, unit in enumerate(units) if n not in gone for one in unit.shared}
    for n in sorted(gone):
        for one in (*units[n].own, *(shared for shared in units[n].shared if shared not in stay)):
            part = unwrap(base.get_submodule(one.path))
            name = f"{one.path}.weight"
            mask = masks.setdefault(name, torch.ones(part.get_parameter("weight").shape, dtype=torch.bool))
            _view(mask, part, one)[:] = False
            bias = part._parameters.get("bias")
            if bias is not None and not one.inputs:
                own = masks.setdefault(f"{one.path}.bias", torch.ones(bias.shape, dtype=torch.bool))
                own[one.start : one.stop] = False
    return masks


def slice_of(matrix: Tensor, base: nn.Module, one: Slice) -> Tensor:
    """The rows or columns of a tensor that has the shape of that linear's weight; a view."""
    return _view(matrix, unwrap(base.get_submodule(one.path)), one)


def _view(matrix: Tensor, part: nn.Module, one: Slice) -> Tensor:
    by_rows = hasattr(part, "in_features") != one.inputs  # GPT-2's Conv1D keeps its weight as (inputs, outputs)
    return matrix[one.start : one.stop] if by_rows else matrix[:, one.start : one.stop]


def _features(base: nn.Module, path: str) -> tuple[int, int]:
    """Outputs and inputs of the linear at `path`."""
    part = unwrap(base.get_submodule(path))
    shape = part.get_parameter("weight").shape
    return (shape[0], shape[1]) if hasattr(part, "in_features") else (shape[1], shape[0])


def _head_width(base: nn.Module, root: str, wide: int) -> int:
    """Outputs of one head, as the attention module itself or, failing that, the model's config says."""
    inside = [part for _, part in walk(base.get_submodule(root))]
    for name in ("head_dim", "attention_head_size"):
        for part in inside:
            if isinstance(getattr(part, name, None), int):
                return int(getattr(part, name))
    said: list[Any] = [*inside, getattr(base, "config", None)]
    for name in ("num_attention_heads", "num_heads", "n_heads", "n_head"):
        for one in said:
            count = getattr(one, name, None)
            if isinstance(count, int) and count:
                if wide % count:
                    raise InputError(f"{wide} outputs of {root} do not divide into {count} heads", where="tune.mode")
                return wide // count
    raise InputError(f"{root} does not say how many heads it has", where="tune.mode", fix="take mode: unstructured")
