"""A pre-trained model beside which something else is trained: its flags, its hash, its widths, which of it may move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luthier.models.topology import Topology
from luthier.tune.base import Probe
from luthier.tune.block_outputs import Pool, Reading, pool, read, stream_widths, to_front
from luthier.weights.hashing import combined, tensor_hash


def move_used(model: nn.Module, topology: Topology, where: Reading) -> None:
    """Gradients for the floating-point parameters that decide what is read in `where`, and for no others: not for
    blocks beyond the last layer that is read, the final norm, a pooler, the head, or another stack."""
    used = where.used()
    beyond = [path for path in where.blocks if path not in used]
    beyond += [stack.final_norm for stack in topology.stacks if stack.final_norm]
    rest = {id(p) for path in beyond for p in model.get_submodule(path).parameters()}
    rest |= {id(p) for name, p in model.named_parameters() if "pool" in name and topology.region(name)[1] is None}
    model.requires_grad_(False)
    for parameter in model.get_submodule(where.trunk).parameters():
        parameter.requires_grad_(parameter.is_floating_point() and id(parameter) not in rest)


class Flags:
    """Which parameters of a model have gradients and which of its modules train, to be put back later."""

    def __init__(self, model: nn.Module):
        self._gradients = [(p, p.requires_grad) for p in model.parameters()]
        self._training = [(m, m.training) for m in model.modules()]

    def restore(self) -> None:
        for parameter, flag in self._gradients:
            parameter.requires_grad_(flag)
        for module, flag in self._training:
            module.training = flag


def weights_hash(model: nn.Module) -> str:
    """Hash of a model's weights and buffers, hex; the same on every device."""
    return combined({name: tensor_hash(t.detach().cpu().contiguous()) for name, t in model.state_dict().items()})


def layer_widths(model: nn.Module, probe: Probe, where: Reading, how: Pool) -> tuple[int, ...]:
    """Of each layer that is read: seen on the probe's first batch, or told by structure."""
    if probe.batches is None:
        return stream_widths(model, probe.topology, where)
    inputs = to_front(inputs_of(next(iter(probe.batches())), model))
    before = Flags(model)
    model.eval()
    try:
        with torch.no_grad():
            return tuple(pool(states, None, how).shape[-1] for states in read(model, where, inputs))
    finally:
        before.restore()


def inputs_of(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """What the model takes of a batch, where the model is."""
    device = next(model.parameters()).device
    moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
    return {name: value for name, value in moved.items() if name != "labels"}


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
