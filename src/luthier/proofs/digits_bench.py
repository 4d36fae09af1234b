"""The bench of several proofs about merging: dense readers of digits, pre-trained on some tasks and tuned on others.

    mlp((64, 256, 256, 256, 10), seed)          an untrained reader; its linears are the blocks 0, 1, 2, ...
    fit(model, pictures, labels, epochs=15, rate=1e-3, seed=0)          Adam, batches of 32, in place
    transformed(pictures, "mirror")             one of six fixed changes of a picture

Weights are handed to `lt.merge` as mappings, `accuracy_of` and `loss_of` put them back into a model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "mirror": lambda p: p.flip(-1),
    "rot90": lambda p: torch.rot90(p, 1, (-2, -1)),
    "invert": lambda p: 1 - p,
    "flip": lambda p: p.flip(-2),
    "roll_x": lambda p: p.roll(3, -1),
    "roll_y": lambda p: p.roll(3, -2),
}


def transformed(pictures: Tensor, name: str) -> Tensor:
    """Pictures (n, 1, 8, 8) of one task, of the same shape."""
    return TRANSFORMS[name](pictures)


def mlp(widths: Sequence[int], seed: int) -> nn.Module:
    """Linears with ReLU between, from flat pictures; named `0`, `1`, ... so that each is a block of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return Reader(layers)


class Reader(nn.ModuleList):
    """Pictures (n, 1, 8, 8) -> scores (n, classes)."""

    def forward(self, pictures: Tensor) -> Tensor:
        hidden = pictures.flatten(1)
        for layer in list(self)[:-1]:
            hidden = F.relu(layer(hidden))
        return self[-1](hidden)


def fit(
    model: nn.Module,
    pictures: Tensor,
    labels: Tensor,
    *,
    rate: float,
    seed: int,
    epochs: int = 0,
    steps: int = 0,
    batch: int = 32,
    each: Callable[[int], None] = lambda step: None,
) -> nn.Module:
    """Train in place with Adam for `epochs` over the pictures, or `steps` if there are none; `each` after every step.

    Args:
        each: called with the number of steps done, from 1.
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    total = steps or epochs * -(-len(labels) // batch)
    model.train()
    order: list[Tensor] = []
    for step in range(1, total + 1):
        if not order:
            order = list(torch.randperm(len(labels), generator=draw).split(batch))
        chosen = order.pop()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(pictures[chosen]), labels[chosen]).backward()
        optimizer.step()
        each(step)
    return model.eval()


def tuned(model: nn.Module, pictures: Tensor, labels: Tensor, *, rate: float, epochs: int, seed: int) -> nn.Module:
    """`fit` on a copy."""
    return fit(copy.deepcopy(model), pictures, labels, rate=rate, epochs=epochs, seed=seed)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Its tensors by name, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with these tensors."""
    made = copy.deepcopy(model)
    made.load_state_dict(dict(tensors))
    return made.eval()


@torch.no_grad()
def accuracy_of(model: nn.Module, tensors: Mapping[str, Tensor], pictures: Tensor, labels: Tensor) -> float:
    """Share right of `model` with these tensors."""
    return float((put(model, tensors)(pictures).argmax(-1) == labels).float().mean())


@torch.no_grad()
def loss_of(model: nn.Module, tensors: Mapping[str, Tensor], pictures: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy in nats of `model` with these tensors."""
    return float(F.cross_entropy(put(model, tensors)(pictures), labels))
