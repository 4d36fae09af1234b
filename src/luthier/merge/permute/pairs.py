"""Two models as a pair: made plain, held against each other, and their heads put side by side."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from luthier.errors import InputError
from luthier.merge.permute.units import Axes, Groups, Split, Stretch, in_axis
from luthier.weights.info import some

HEAD = "head"  # the group of a stacked head's outputs


def without_adapter(model: Any) -> nn.Module:
    """A PEFT model as a plain one, in a copy."""
    if not hasattr(model, "merge_and_unload"):
        return model
    return copy.deepcopy(model).merge_and_unload().eval()


def same_architecture(a: nn.Module, b: nn.Module, head: str | None, heads: str) -> None:
    """`InputError` with names if B's tensors are not of A's shapes; only a head that is stacked may differ."""
    if heads == "stack" and head is None:
        raise InputError("it is not known which layer is the head", where="heads", fix="merge the models without it")
    states = [{n: tuple(t.shape) for n, t in model.state_dict().items()} for model in (a, b)]
    other = sorted(set(states[0].items()) ^ set(states[1].items()))
    names = [name for name in dict.fromkeys(n for n, _ in other) if head is None or not name.startswith(f"{head}.")]
    if type(a) is not type(b) or names:
        told = f": {some(names)}" if names else ""
        raise InputError(f"{type(a).__name__} and {type(b).__name__} are not one architecture{told}", where="models")


def stacked_head(a: Any, b: Any, groups: Groups) -> tuple[Axes, Split, list[str] | None]:
    """Axes with the head's outputs as units of their own, none of them merged; and the names of all labels."""
    head, axes = a.get_submodule(groups.head), dict(groups.axes)
    sizes = [model.get_submodule(groups.head).weight.shape[1 - in_axis(head)] for model in (a, b)]
    outputs = (Stretch(HEAD, sizes[0]),)
    name = f"{groups.head}.weight"
    axes[name] = axes.get(name, {}) | {1 - in_axis(head): outputs}
    if head.bias is not None:
        axes[f"{groups.head}.bias"] = {0: outputs}
    split = Split(torch.empty(0, 2, dtype=torch.int64), *(torch.arange(size) for size in sizes))
    labels = None
    if hasattr(a, "config"):
        ours, theirs = (list(model.config.id2label.values()) for model in (a, b))
        labels = [*ours, *(f"{name} (2)" if name in ours else name for name in theirs)]
    return axes, split, labels
