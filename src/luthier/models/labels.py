"""The classes of a classifier: which number each has, and a new head where the model's own knows others.

    numbers = label_numbers(model, classes)      {"cat": 0, "dog": 1}, or None: the head is one for other classes
    numbers = new_head(model, topology, classes, seed)

A head is kept, since what it has learned counts, if it knows all classes by name (`label2id` of its config), or if its
labels have no names and either the classes are their numbers or there are as many. Any other head is of another task;
its last linear is replaced by one with random numbers. Either way the names stand in the config afterwards
(`id2label`), where a saved model keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from luthier.errors import InputError
from luthier.models.regions import unwrapped
from luthier.models.structure import is_linear
from luthier.models.topology import Topology

_UNNAMED = re.compile(r"LABEL_\d+")
_WHOLE = re.compile(r"0|[1-9]\d{0,17}", re.ASCII)


def label_numbers(model: nn.Module, classes: Sequence[str]) -> dict[str, int] | None:
    """The number that the model's head gives each of `classes`, by its name as text; None if it is a head for others.

    Labels without a name (`LABEL_0`) are named in `model.config`, by the order of `classes`.
    """
    config: Any = model.config
    known = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    names = list(classes)
    if known.keys() >= set(names):
        return known
    if not all(_UNNAMED.fullmatch(name) for name in known):
        return None
    if all(_WHOLE.fullmatch(name) and int(name) < len(known) for name in names):
        names = [str(number) for number in range(len(known))]
    if len(names) != len(known):
        return None
    return name_labels(model, names)


def new_head(model: nn.Module, topology: Topology, classes: Sequence[str], seed: int) -> dict[str, int]:
    """Replace the model's last linear by a random one for `classes`, in their order; returns their numbers.

    Weights are normal with the deviation that the config names (`initializer_range`, else 0.02), a bias is zero.
    Raises `InputError` for a model without a head of its own.
    """
    base, _ = unwrapped(model)
    old: Any = base.get_submodule(topology.head) if topology.head else None
    if old is None or not is_linear(old) or old.out_features != getattr(base.config, "num_labels", None):
        raise InputError(
            f"{type(base).__name__} has no label head that could be made anew",
            fix="load it with one (model.kind: sequence-classifier or image-classifier)",
        )
    made = nn.utils.skip_init(nn.Linear, old.in_features, len(classes), bias=old.bias is not None)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.weight.normal_(0.0, float(getattr(base.config, "initializer_range", None) or 0.02), generator=draw)
        if made.bias is not None:
            made.bias.zero_()
    parent, _, name = str(topology.head).rpartition(".")
    setattr(base.get_submodule(parent), name, made.to(old.weight.device, old.weight.dtype).train(old.training))
    return name_labels(base, classes)


def in_number_order(numbers: Mapping[str, int]) -> list[str]:
    """Names of classes in the order of their numbers."""
    return sorted(numbers, key=lambda name: numbers[name])


def name_labels(model: nn.Module, classes: Sequence[str]) -> dict[str, int]:
    """Write the names of a model's labels, in the order of their numbers, into its config; returns their numbers."""
    names = list(classes)
    config: Any = model.config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    if hasattr(model, "num_labels"):
        model.num_labels = len(names)  # type: ignore[assignment]
    return dict(config.label2id)
