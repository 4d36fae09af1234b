"""LoRA factors inside a PEFT model: which parameters they are, and the same model without its tuning."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.weights.info import some

_FACTOR = re.compile(r"\.lora_(?:embedding_)?[AB](?:\.|$)")
_ADDED = re.compile(r"\.lora_")


def factors_in(model: nn.Module) -> set[str]:
    """Names of the parameters that are LoRA factors; empty for a model without an adapter.

    Raises `InputError` for an adapter that is folded into the weights at the moment: its factors do nothing then.
    """
    found = {name for name, _ in model.named_parameters() if _FACTOR.search(name)}
    if found and any(getattr(part, "merged", False) is True for part in model.modules()):
        raise InputError("its adapter is merged into the weights", where="models", fix="call unmerge_adapter() first")
    return found


def without_factors(tuned: nn.Module, base: nn.Module | None) -> nn.Module:
    """A copy of `tuned` with factors of zero; `base`, where one is given, must be what the adapter stands on.

    Raises `InputError` that names weights of `base` that are others.
    """
    if base is not None and base.state_dict().keys() == tuned.state_dict().keys():
        return base
    if base is not None:
        ours, theirs = _plain(base), _plain(tuned)
        other = sorted(n for n in ours.keys() | theirs.keys() if not _same(ours.get(n), theirs.get(n)))
        if other:
            raise InputError(f"the adapter stands on other weights than the base given ({some(other)})", where="base")
    empty = copy.deepcopy(tuned)
    with torch.no_grad():
        for name, parameter in empty.named_parameters():
            if _FACTOR.search(name):
                parameter.zero_()
    return empty


def _plain(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model by the names that they have without an adapter."""
    state = model.state_dict()
    kept = {n: t for n, t in state.items() if not _ADDED.search(n)}
    return {n.removeprefix("base_model.model.").replace(".base_layer", ""): t for n, t in kept.items()}


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)
