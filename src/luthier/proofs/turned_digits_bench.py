"""The counter-bench of several proofs about merging: digits, turned and mirrored, where tuning is dense.

A dense network of four layers, width 256, first learns all six ways of looking at digits together (as they are, turned
by one, two and three quarters, mirrored, transposed) from the same 150 pictures; then a copy of it is tuned on each
way with all training pictures. A turned 6 is a 9, so no network can be right on all of them: each tuned one knows
which way it looks. Steps and rates are such that an average of the models is better than their base, though not by
much (on seed 0: base 0.81, average 0.82, single networks 0.92). Of the training pictures 200 are kept back to choose a
scale among 15.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from luthier.merge.run import merge
from luthier.merge.search import merge_search
from luthier.worlds.digits import digits, train

WAYS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    lambda x: x.rot90(1, (2, 3)),
    lambda x: x.rot90(2, (2, 3)),
    lambda x: x.rot90(3, (2, 3)),
    lambda x: x.flip(3),
    lambda x: x.transpose(2, 3),
)
SCALES = [round(0.1 * step, 1) for step in range(1, 16)]
WIDTH, CHOOSING, SHOWN = 256, 200, 150


class TurnedDigits:
    """Base and tuned networks of one seed."""

    def __init__(self, seed: int):
        pictures, labels = digits("train")
        mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        pictures, labels = pictures[mixed], labels[mixed]
        test, answers = digits("test")
        parts = {"choose": (pictures[:CHOOSING], labels[:CHOOSING]), "test": (test, answers)}
        self._parts = {part: [(way(shown).contiguous(), said) for way in WAYS] for part, (shown, said) in parts.items()}
        pictures, labels = pictures[CHOOSING:], labels[CHOOSING:]
        self._network = _network(seed)
        shown = torch.cat([way(pictures[:SHOWN]) for way in WAYS])
        train(self._network, shown, labels[:SHOWN].repeat(len(WAYS)), steps=200, rate=1e-3, seed=seed)
        self.base = _state(self._network)
        self.models = []
        for number, way in enumerate(WAYS):
            tuned = copy.deepcopy(self._network)
            train(tuned, way(pictures), labels, steps=150, rate=3e-4, seed=100 * seed + number)
            self.models.append(_state(tuned))

    @torch.no_grad()
    def accuracy(self, state: Mapping[str, Tensor], ways: range = range(len(WAYS)), part: str = "test") -> float:
        """Mean over the ways of the share right."""
        shares = []
        for way in ways:
            shown, said = self._parts[part][way]
            scores = functional_call(self._network, dict(state), (shown,))
            shares.append(float((scores.argmax(-1) == said).float().mean()))
        return sum(shares) / len(shares)

    def single(self) -> float:
        """The same of each way's own network."""
        return sum(self.accuracy(model, range(way, way + 1)) for way, model in enumerate(self.models)) / len(WAYS)

    def tried(self, settings: Any) -> float:
        """Accuracy of the merge with the scale that the choosing pictures like best."""
        found = merge_search(
            settings,
            base=self.base,
            models=self.models,
            evaluate=lambda merged: self.accuracy(merged, part="choose"),
            grid=SCALES,
        )
        return self.accuracy(found.merged.tensors)

    def merged(self, settings: Any) -> float:
        """Accuracy of the merge with the settings as they are."""
        return self.accuracy(merge(settings, base=self.base, models=self.models).tensors)


@cache
def turned_digits(seed: int) -> TurnedDigits:
    """The bench of a seed; several proofs run in one process share it."""
    return TurnedDigits(seed)


def _network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, WIDTH)]
        for width in (WIDTH, WIDTH, 10):
            layers += [nn.ReLU(), nn.Linear(WIDTH, width)]
        return nn.Sequential(*layers)


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
