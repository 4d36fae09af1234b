"""The bench of several proofs: teach a model of the facts world new facts with one tuning, and look what is left."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from luthier.methods import build
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.train import Loop, TrainSettings
from luthier.train.probing import probe_of
from luthier.tune import Tuned, Tuning
from luthier.worlds.facts import Facts


def teach(
    base: nn.Module,
    world: Facts,
    relations: Iterable[int],
    tuning: dict[str, Any] | Tuning,
    *,
    learning_rate: float = 1e-3,
    steps: int = 300,
    seed: int = 0,
) -> tuple[nn.Module, Loop]:
    """A copy of `base` after `steps` AdamW steps of 60 rows on the facts of `relations`, and the loop that made it.

    60 rows rather than 64, so that 120 facts are two whole steps. The rate is constant, without warm-up.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    settings = TrainSettings(
        learning_rate=learning_rate,
        max_steps=steps,
        effective_batch_size=60,
        lr_scheduler_type="constant",
        warmup_steps=0,
    )
    rows = world.examples(relations)
    probe = probe_of(Topology.of(model), Sft(), settings, rows, seed=seed)
    tuned: Tuned = build("tune", tuning).attach(model, probe)  # type: ignore[attr-defined]
    loop = Loop(tuned, Sft(), settings, rows, seed=seed, device="cpu")
    loop.run()
    return tuned.model.eval(), loop
