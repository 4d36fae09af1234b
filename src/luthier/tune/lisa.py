"""LISA: full tuning in which at any moment only the embedding, the head and a few blocks move.

    every `interval` optimiser steps: freeze all blocks, draw `active_layers` of them, uniformly, without replacement
    the embedding, the head and the final norm move all the time

Gradients and moments exist only for what moves, so memory comes near LoRA's while every weight gets its turn, and the
outcome is an ordinary model. The draw of a period is a pure function of seed and period: a resumed run, and each of
several processes, draws the same blocks.

    state: drop     moments of all blocks are deleted at each draw; a drawn block starts from zero   (default)
    state: keep     they stay: no memory is saved, a block goes on where it left off
    state: offload  they wait in the processor's memory

When not to use it: with several accelerators that shard the model (FSDP), with a large vocabulary on a small model
(embedding and head then are most of what moves), or where an adapter is wanted as the outcome.

Source: Pan et al., LISA, NeurIPS 2024, algorithm 1 (arXiv 2403.17919). Ours: `weights` (draws with given
probabilities), `state`, and that all blocks of an encoder-decoder model form one stack. Like the authors' later code,
`drop` also forgets a block that is drawn twice in a row. There is no 1/p correction of the gradient, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import nn

from luthier.errors import InputError
from luthier.models.topology import Topology
from luthier.tune.base import Probe, Tuned
from luthier.tune.selector.slots import Every, Slots, View
from luthier.tune.selector.tensors import Draw, SelectsTensors, Unit
from luthier.tune.whole import outside_blocks


class Lisa(SelectsTensors):
    """Layerwise importance sampling.

    Attributes:
        active_layers: blocks that move at a time, 0 (embedding and head only) to all.
        interval: optimiser steps between two draws.
        weights: a probability for each block instead of equal ones; blocks are drawn one after the other, each in
            proportion to what is left.
        state: what happens to the moments of blocks that rest.
        train_embeddings, train_lm_head: whether those move all the time, or never.
        seed: of the draws, beside the run's own.
    """

    method: Literal["lisa"] = "lisa"
    paper: ClassVar[int | None] = 48
    default_learning_rate: ClassVar[float] = 5e-5
    active_layers: int = Field(default=2, ge=0)
    interval: int = Field(default=20, ge=1)
    weights: tuple[float, ...] | None = None
    state: Literal["drop", "keep", "offload"] = "drop"
    train_embeddings: bool = True
    train_lm_head: bool = True
    seed: int = Field(default=0, ge=0)

    def slots(self) -> Slots:
        return Slots(
            scope=Blocks(self.train_embeddings, self.train_lm_head),
            score=Draw(self.seed, self.weights),
            choose=Exactly(self.active_layers),
            competition="global",
            granularity="block",
            schedule=Every(self.interval),
            apply="requires_grad",
            on_reselect=self.state,
        )

    def attach(self, model: nn.Module, probe: Probe) -> Tuned:
        count = len(probe.topology.blocks)
        if self.active_layers > count:
            raise InputError(
                f"active_layers is {self.active_layers}, but the model has {count} blocks", where="tune.active_layers"
            )
        if self.weights is not None:
            drawable = sum(weight > 0 for weight in self.weights)
            if len(self.weights) != count or min(self.weights) < 0 or drawable < self.active_layers:
                raise InputError(
                    f"weights must be {count} numbers of at least 0, {self.active_layers} of them above",
                    where="tune.weights",
                )
        return super().attach(model, probe)


@dataclass(frozen=True)
class Blocks:
    """The blocks are the units; what lies outside of them always moves, as far as the two settings say."""

    train_embeddings: bool = True
    train_lm_head: bool = True

    def units(self, model: nn.Module, topology: Topology) -> list[Unit]:
        return [
            Unit(
                frozenset(n for n in topology.parameters(block=i) if model.get_parameter(n).is_floating_point()),
                "block",
                i,
            )
            for i in range(len(topology.blocks))
        ]

    def always(self, model: nn.Module, topology: Topology) -> set[str]:
        return outside_blocks(model, topology, train_embeddings=self.train_embeddings, train_lm_head=self.train_lm_head)

    def __str__(self) -> str:
        return "layer blocks (everything outside always moves)"


@dataclass(frozen=True)
class Exactly:
    """So many of the units, drawn."""

    count: int

    def units(self, view: View, units: Sequence[Unit], score: Draw) -> set[int]:
        return set(draw(len(units), self.count, score.seeds(view), score.weights))

    def __str__(self) -> str:
        return f"exactly {self.count}"


def draw(count: int, active: int, seed: tuple[int, ...], weights: tuple[float, ...] | None = None) -> list[int]:
    """`active` distinct numbers below `count`, ascending; equally likely, or in proportion to `weights`."""
    random = np.random.default_rng(seed)
    if weights is None:
        return sorted(random.permutation(count)[:active].tolist())
    left = np.asarray(weights, float)
    drawn: list[int] = []
    for _ in range(active):
        index = int(random.choice(count, p=left / left.sum()))
        drawn.append(index)
        left[index] = 0.0
    return sorted(drawn)
