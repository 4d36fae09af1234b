"""The groups of a model: given, traced or built from its topology, and checked by what they promise.

A permutation of all units along all axes of their groups must leave what the model computes as it is. That is tried on
one batch, with random permutations from a seed; groups that lack an axis, or name one too many, do not pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from luthier.errors import InputError
from luthier.merge.permute import tracing, transformers
from luthier.merge.permute.capture import first_tensor, run
from luthier.merge.permute.units import Axes, Groups, Split, all_places, given_groups, split_of, taken

Given = Mapping[str, Sequence[Sequence[Any]]]


def find(
    model: nn.Module, parts: Sequence[transformers.Part], given: Given | None, probe: Any | None, seed: int
) -> Groups:
    """The groups of `model`.

    Args:
        parts: of a transformers model.
        given: groups as the user lists them; None finds them.
        probe: a batch to try them on; None, and a transformers model's own dummy inputs are taken, or of a plain
            one the graph is trusted.

    Raises `InputError` if there are none, or permuting them changes what the model computes.
    """
    if probe is None and isinstance(model, PreTrainedModel):
        probe = model.dummy_inputs
    if given is not None:
        choices = iter([given_groups(given, model.state_dict())])
    elif isinstance(model, PreTrainedModel):
        choices = transformers.candidates(model, parts)
    else:
        choices = iter([tracing.trace(model)])
    far = 0.0
    for groups in choices:
        if not groups.groups:
            raise InputError(f"{type(model).__name__} has no units that could be permuted", fix="average it (linear)")
        far = change(model, groups, probe, seed) if probe is not None else 0.0
        if far <= tolerance(model):
            return groups
    raise InputError(
        f"permuting the units of {type(model).__name__} changes its outputs by {far:.0%}, so some axis is missing "
        "or wrong in its groups",
        where="groups" if given is not None else None,
        fix="leave a part out of `parts`, or list `groups` yourself" if given is None else "list every axis",
    )


@torch.no_grad()
def change(model: nn.Module, groups: Groups, probe: Any, seed: int) -> float:
    """How far random permutations of all groups move the outputs on a batch: norm of the change over theirs."""
    draw = torch.Generator().manual_seed(seed)
    splits = {}
    for name, group in groups.groups.items():
        order = torch.randperm(group.units, generator=draw)
        splits[name] = split_of(order, torch.ones(group.units, dtype=torch.bool))
    state = permuted(model.state_dict(), groups.axes, splits)
    before = first_tensor(run(model, probe)).double()
    after = first_tensor(run(_Stateful(model, state), probe)).double()
    return float((after - before).norm() / before.norm().clamp(min=1e-30))


def tolerance(model: nn.Module) -> float:
    """The rounding that a sum in another order may cost."""
    return 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.1


def permuted(state: Mapping[str, Tensor], axes: Axes, splits: Mapping[str, Split]) -> dict[str, Tensor]:
    """The tensors with axes, with the unit that `splits` names as partner in place of each unit."""
    found = {}
    for name, where in all_places(axes, splits).items():
        tensor = state[name]
        for axis, places in where.items():
            tensor = taken(tensor, places.b, axis, torch.ones(places.width))
        found[name] = tensor
    return found


class _Stateful(nn.Module):
    """A model that computes with other tensors than its own."""

    def __init__(self, model: nn.Module, state: dict[str, Tensor]):
        super().__init__()
        self.model, self.state = model, state

    def forward(self, *args: Any, **named: Any) -> Any:
        return functional_call(self.model, self.state, args, named, tie_weights=False)
