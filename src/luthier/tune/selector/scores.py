"""Scores that several methods share: a number for each entry of a tensor. A method's own score stands in its file."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from luthier.errors import InputError
from luthier.models.modes import evaluating
from luthier.tune.selector.slots import Score, View


@dataclass(frozen=True)
class Magnitude(Score):
    """|w| of the present weights."""

    def entries(self, view: View, name: str) -> Tensor:
        return view.weight(name).abs()

    def __str__(self) -> str:
        return "|w|"


@dataclass(frozen=True)
class Random(Score):
    """Uniform in [0, 1), from the seeds, the period and the tensor's name alone: the same on every machine."""

    seed: int = 0

    def entries(self, view: View, name: str) -> Tensor:
        return torch.rand(view.model.get_parameter(name).shape, generator=self.generator(view, name))

    def generator(self, view: View, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{view.probe.seed} {self.seed} {view.period} {name}".encode()))

    def __str__(self) -> str:
        return "uniform random"


@dataclass(frozen=True)
class OfGradients(Score):
    """A score made of the gradients on the probe's first batches at the present weights: see `KINDS`."""

    kind: str
    batches: int = 4
    found: Mapping[str, Tensor] | None = None

    def prepared(self, view: View, names: Sequence[str]) -> Score:
        add, _ = KINDS[self.kind]
        found: dict[str, Tensor] = {}

        def visit(name: str, gradient: Tensor) -> None:
            found[name] = add(found.get(name), gradient, view.model.get_parameter(name).detach().float())

        visit_gradients(view, names, visit, self.batches)
        lost = [name for name in names if name not in found]
        if lost:
            raise InputError(f"the loss on the run's own rows does not depend on {lost[0]}", where="tune.score")
        return OfGradients(self.kind, self.batches, {name: tensor.abs_() for name, tensor in found.items()})

    def entries(self, view: View, name: str) -> Tensor:
        assert self.found is not None
        return self.found[name]

    def __str__(self) -> str:
        return KINDS[self.kind][1]


def _sum(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else old.add_(new)


# How a batch's gradient g joins what the earlier ones left, given the weight w, and the score in words.
KINDS: dict[str, tuple[Callable[[Tensor | None, Tensor, Tensor], Tensor], str]] = {
    "gradient": (lambda old, g, w: _sum(old, g.clone()), "|sum of gradients|"),
    "movement": (lambda old, g, w: _sum(old, g * w), "|sum of g w|"),
    "hessian": (lambda old, g, w: _sum(old, g * g), "sum of g^2"),
    "momentum": (lambda old, g, w: g.clone() if old is None else old.lerp_(g, 0.1), "|moving average of gradients|"),
}


def visit_gradients(
    view: View, names: Sequence[str], visit: Callable[[str, Tensor], None], batches: int | None = None
) -> None:
    """Hand over the gradient of each tensor on each of the probe's first `batches` (all of them if None), in float32,
    as the backward pass makes it.

    No more than one is in memory at a time unless `visit` keeps it. The model's own gradients, modes and random states
    are as before. Raises `InputError` where there are no batches: not every objective can be asked beforehand.
    """
    model, probe = view.model, view.probe
    if probe.batches is None or probe.loss is None:
        raise InputError(
            "this score looks at gradients on the run's own rows, and there are none to look at here",
            where="tune",
            fix="take a score of the weights alone, or hand `batches` and `loss` to Probe",
        )
    wanted = {name: model.get_parameter(name) for name in names}
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}

    def hand_over(parameter: Tensor, name: str) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        visit(name, gradient.float())

    handles = []
    try:
        for parameter in before:
            parameter.grad = None
            parameter.requires_grad_(False)
        for name, parameter in wanted.items():
            parameter.requires_grad_(True)  # before the hook, which only such a parameter takes
            handles.append(parameter.register_post_accumulate_grad_hook(partial(hand_over, name=name)))
        with torch.random.fork_rng(), evaluating(model):
            for batch in islice(probe.batches(), batches):
                probe.loss(model, batch).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, (flag, gradient) in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradient
