"""Parts for learning beside an older self: a teacher that follows slowly, and a classifier with rows from means.

    teacher = EMATeacher(student)            the student without its adapter, frozen
    teacher.update(student, 0.999)           theta <- theta + (1 - m) (theta of the student's base - theta)
    classifier.imprint(batches, {4, 5})      row of a class <- mean feature of its examples, nothing else changes

The teacher is a moving average in the difference form. m theta + (1 - m) theta' is the same in exact arithmetic, but
rounds even where both weights are equal, and would drift by 2e-5 in 50 steps while nothing moves. Here equal weights
stay equal to the last bit, and m = 1 never changes anything.

Adapters are not merged into the teacher: it follows the weights below them only. As long as nothing but an adapter
moves, teacher and pre-trained model are one and the same; what the two see differs by the adapter. That is what CoACT
calls asynchronous (Roy et al., TMLR 2025).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.errors import InputError
from luthier.models.regions import unwrapped


class EMATeacher(nn.Module):
    """A frozen copy of a student without its adapter; always in evaluation mode.

    Args:
        student: plain, or wrapped by PEFT; its weights are copied, not shared.
        drop: parameters a part of whose name begins with this belong to the adapter and have no counterpart.

    Raises `InputError` where a weight of the copy has none in the student.
    """

    def __init__(self, student: nn.Module, drop: str = "lora"):
        super().__init__()
        self.drop = drop
        self.model = _without_wrappers(unwrapped(copy.deepcopy(student))[0]).requires_grad_(False)
        self.eval()
        missing = {name for name, _ in self.model.named_parameters()} ^ base_weights(student, drop).keys()
        if missing:
            raise InputError(
                f"the student's parameters differ from its base's at {', '.join(sorted(missing)[:4])}",
                where="drop",
                fix="name the adapter's parameters as `drop`",
            )

    def train(self, mode: bool = True) -> EMATeacher:
        """A teacher has no dropout: it stays as it is."""
        return super().train(False)

    def forward(self, *args: object, **inputs: object) -> object:
        return self.model(*args, **inputs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Move towards the student's base weights by 1 - momentum of the way; `momentum` from 0 to 1."""
        if not 0 <= momentum <= 1:
            raise InputError(f"expected a momentum from 0 to 1, got {momentum}", where="momentum")
        if momentum == 1:
            return
        theirs = base_weights(student, self.drop)
        for name, own in self.model.named_parameters():
            own.add_(theirs[name].to(own) - own, alpha=1 - momentum)


def base_weights(student: nn.Module, drop: str = "lora") -> dict[str, nn.Parameter]:
    """The parameters below an adapter by their names in the plain model: PEFT's prefixes and wrappers taken out."""
    base, _ = unwrapped(student)
    return {
        name.replace(".base_layer", ""): parameter
        for name, parameter in base.named_parameters()
        if not any(part.startswith(drop) for part in name.split("."))
    }


def _without_wrappers(base: nn.Module) -> nn.Module:
    """Each layer that PEFT wrapped is put back in place of its wrapper, in place."""
    for name, layer in list(_wrapped(base)):
        parent, _, own = name.rpartition(".")
        setattr(base.get_submodule(parent) if parent else base, own, layer)
    return base


def _wrapped(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in base.named_modules():
        inner = module._modules.get("base_layer")
        if inner is not None:
            yield name, inner


class PrototypeClassifier(nn.Module):
    """A linear layer without bias over all classes, those to come included: (n, width) features -> (n, classes).

    Features are used as they are, so the lengths of the rows decide how sharp the first logits are.
    """

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as nn.Linear begins

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight)

    @torch.no_grad()
    def imprint(self, loader: Iterable[tuple[Tensor, Tensor]], classes: Collection[int]) -> None:
        """Set the row of each of `classes` to the mean feature of its examples; other rows keep their bits.

        Args:
            loader: batches of features (n, width) and labels (n,); examples of other classes are passed over.

        Raises `InputError` for a class without examples or without a row.
        """
        sums: Mapping[int, Tensor] = {c: torch.zeros(self.weight.shape[1], dtype=torch.float64) for c in classes}
        counts = dict.fromkeys(classes, 0)
        for features, labels in loader:
            for label in classes:
                own = features[labels == label]
                sums[label].add_(own.double().sum(0).cpu())
                counts[label] += len(own)
        outside = [c for c in classes if not 0 <= c < len(self.weight)]
        if outside:
            raise InputError(f"class {outside[0]} has no row among {len(self.weight)}", where="classes")
        empty = [c for c, count in counts.items() if not count]
        if empty:
            raise InputError(f"class {empty[0]} has no example to imprint it from", where="classes")
        for label in classes:
            self.weight[label] = (sums[label] / counts[label]).to(self.weight)
