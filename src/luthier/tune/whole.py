"""What tunings share that move a model's own weights: which parts stay out, the optimiser's memory, and saving.

A model is cut in two here. Its blocks are what a method chooses from; everything outside of them (embeddings, head,
final norm) moves unless `train_embeddings` or `train_lm_head` says otherwise. An embedding that is tied to the head
is one parameter, so the two settings must agree about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from luthier.errors import InputError
from luthier.models.shards import is_sharded
from luthier.models.topology import Topology
from luthier.tune.base import Tuned, Tuning


class WholeModel(Tuned):
    """The model itself; saved as a whole."""

    def save(self, directory: Path) -> str:
        self.model.save_pretrained(directory)  # type: ignore[operator]
        return "model"

    def merged(self) -> nn.Module:
        return self.model.requires_grad_(False)


class Switching(WholeModel):
    """A whole model in which other parameters move in other steps; the optimiser holds all that may ever move."""

    switches = True

    def __init__(self, settings: Tuning, model: nn.Module, candidates: Iterable[str]):
        """All `candidates` (names) have gradients until the first step, so that every wrapper around knows them."""
        names = set(candidates)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        self.candidates = names
        super().__init__(settings, model, model)

    def moving(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if name in self.candidates}

    def on_phase_begin(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int, steps: int | None = None) -> None:
        if is_sharded(self.model.parameters()):
            raise InputError(
                f"tune.method {self.settings.method!r} changes what moves between steps, which FSDP cannot follow",
                fix="launch without FSDP, or take lora",
            )
        self.optimizer, self.steps_per_epoch = optimizer, steps_per_epoch

    def switch(self, active: set[str]) -> None:
        """From now on only the candidates in `active` have gradients; those of the others are given back."""
        for name, parameter in self.moving().items():
            parameter.requires_grad_(name in active)
            if name not in active:
                parameter.grad = None


def refuse_wrapped(method: str, model: nn.Module) -> None:
    """These tunings move a model's own weights; under an adapter they would move both or neither."""
    if hasattr(model, "peft_config"):
        raise InputError(f"tune.method {method!r} takes a plain model, not one with an adapter", fix="merge it first")


def refuse_quantised(method: str, model: nn.Module, names: Iterable[str]) -> None:
    """Entries of packed or scaled weights cannot be stepped one by one."""
    for name in names:
        weight = model.get_parameter(name)
        if not weight.is_floating_point() or weight.element_size() < 2 or hasattr(weight, "quant_state"):
            raise InputError(
                f"tune.method {method!r} steps single weights, and {name} is quantised ({weight.dtype})",
                fix="load the model unquantised, or take lora",
            )


def outside_blocks(
    model: nn.Module, topology: Topology, *, train_embeddings: bool = True, train_lm_head: bool = True
) -> set[str]:
    """Names of the parameters outside the blocks that may move; floating point only.

    Raises `InputError` if one parameter is both embedding and head and the two settings differ.
    """
    wanted = {"embedding": train_embeddings, "head": train_lm_head}
    twins = {name: group for group in topology.tied for name in group}
    chosen = set()
    for name, parameter in model.named_parameters():
        names = twins.get(name, (name,))
        if any(topology.region(n)[1] is not None for n in names) or not parameter.is_floating_point():
            continue
        # A tied weight belongs to the region of the embedding under all its names; the head's path tells the other.
        regions = {
            "head" if topology.head and n.startswith(f"{topology.head}.") else topology.region(n)[0] for n in names
        }
        says = {wanted[region] for region in regions & wanted.keys()}
        if len(says) > 1:
            raise InputError(
                f"{' and '.join(names)} are one parameter, but only one of the two is to move",
                where="tune",
                fix="set train_embeddings and train_lm_head alike",
            )
        if says != {False}:
            chosen.add(name)
    return chosen


def forget(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Delete what the optimiser remembers of `parameters`; they begin anew, step count included."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def move_memory(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], away: bool) -> None:
    """Take what the optimiser remembers of `parameters` to the processor's memory, or back to where they are."""
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                state[key] = value.to("cpu" if away else parameter.device)
