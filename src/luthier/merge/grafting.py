"""Grafts of two models of one shape: which parameters may be tuned ones, and values copied where a region says so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.merge.candidates import meets, regions_of_module
from luthier.merge.factors import factors_in
from luthier.merge.sources import distinct
from luthier.weights.compare import comparable
from luthier.weights.info import infos_of
from luthier.weights.selection import Selection

Masks = dict[str, Tensor]
Tasks = Mapping[str, Callable[[nn.Module], float]]


@dataclass(frozen=True)
class Pair:
    """Candidate parameters of base and tuned by name, and names of what is always the tuned model's."""

    base: dict[str, Tensor]
    tuned: dict[str, Tensor]
    always: dict[str, Tensor]

    @classmethod
    def of(cls, base: nn.Module, tuned: nn.Module, exclude: Sequence[str], always: Sequence[str]) -> Pair:
        """Candidates are the LoRA factors if there are any, else all parameters, but those that are excluded.

        Raises `InputError` if the two models are not alike, or nothing that may be grafted differs.
        """
        ours, theirs = distinct(base), distinct(tuned)
        widened = comparable(infos_of(ours), infos_of(theirs))
        if widened:
            name, dtypes = next(iter(widened.items()))
            what = f"{name} is {dtypes[0]} in the base and {dtypes[1]} in the tuned model"
            raise InputError(what, fix="load both in one type")
        region = regions_of_module(base, list(ours))
        whole = {n: t for n, t in theirs.items() if meets(n, region(n), always)}
        chosen = factors_in(tuned) or {n for n, p in base.named_parameters() if p.is_floating_point()}
        names = [n for n in ours if n in chosen and not meets(n, region(n), (*exclude, *always))]
        pair = cls({n: ours[n].detach() for n in names}, {n: theirs[n].detach() for n in names}, whole)
        if not any(not torch.equal(pair.base[n], pair.tuned[n]) for n in names):
            raise InputError("tuned and base are equal wherever they may be grafted", where="models")
        return pair

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.base.items()}

    def delta(self, name: str) -> Tensor:
        """tuned - base, float32."""
        return self.tuned[name].float() - self.base[name].float()

    @torch.no_grad()
    def write(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Set the candidates of `model` by masks: bool ones copy values, others mix base + gamma (tuned - base)."""
        held = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        for name, tensor in self.always.items():
            held[name].copy_(tensor)
        for name, gamma in masks.items():
            if gamma.dtype == torch.bool:
                held[name].copy_(torch.where(gamma.to(self.base[name].device), self.tuned[name], self.base[name]))
            else:
                held[name].copy_(self.base[name].float() + gamma * self.delta(name))


def graft(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], selection: Selection) -> dict[str, Tensor]:
    """The tuned values where `selection` has them, the base's elsewhere, bit for bit; tensors by name, new ones."""
    unknown = sorted(set(selection) - (set(base) & set(tuned)))
    if unknown:
        raise InputError(f"the region has {unknown[0]}, which base and tuned do not both hold", where="selection")
    grafted = {name: tensor.clone() for name, tensor in base.items()}
    for name in selection:
        mask = selection.mask(name).to(base[name].device)
        grafted[name] = torch.where(mask, tuned[name], base[name])
    return grafted


def region_gains(
    base: nn.Module, tuned: nn.Module, regions: Mapping[str, Selection], tasks: Tasks
) -> dict[str, dict[str, float]]:
    """Of a model tuned on several tasks: the gain on each task by grafting each region, over the tuned model's gain.

    Returns region -> task -> share; a task on which the tuned model gains nothing is `nan`.
    """
    ours, theirs = distinct(base), distinct(tuned)
    model = copy.deepcopy(base).eval()
    before = {task: evaluate(base) for task, evaluate in tasks.items()}
    whole = {task: evaluate(tuned) - before[task] for task, evaluate in tasks.items()}
    found: dict[str, dict[str, float]] = {}
    for name, region in regions.items():
        model.load_state_dict(graft(ours, theirs, region), strict=False)
        gains = {task: evaluate(model) - before[task] for task, evaluate in tasks.items()}
        found[name] = {task: gains[task] / whole[task] if whole[task] else float("nan") for task in tasks}
    return found
