"""Gradient checkpointing: whether it is on, and letting the backward pass end early in spite of it.

Checkpointing makes each block's forward pass again on the way back. Whoever turns it on usually asks for gradients of
the embeddings' output too, which the reentrant kind needs to work at all; then every backward pass goes all the way
down, and freezing what lies deep saves nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from luthier.errors import InputError
from luthier.models.topology import Topology


def recomputes(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def end_early(model: nn.Module, topology: Topology) -> list[Callable[[], None]]:
    """Under gradient checkpointing, let the backward pass end at the earliest tensor that moves.

    Hooks cut the output of embeddings that rest, so call it after checkpointing was turned on. Returns what takes them
    away again. Raises `InputError` for the reentrant kind.
    """
    kept = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    if any(getattr(func, "keywords", {}).get("use_reentrant", False) for func in kept):
        raise InputError(
            "reentrant gradient checkpointing needs gradients of the input, so nothing of the backward pass is saved",
            where="tune.method",
            fix="turn it on with use_reentrant: false, or leave it off",
        )

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        rests = isinstance(output, torch.Tensor) and not any(p.requires_grad for p in module.parameters())
        return output.detach() if rests else output

    return [model.get_submodule(path).register_forward_hook(cut).remove for path in topology.embeddings]
