"""Full tuning: every weight moves.

The strongest and the dearest choice: gradients and two moments for each weight (16 bytes a weight in float32 with
AdamW, beside activations), and the most is forgotten. Use it when the data are many, or far from what the model knows;
otherwise try `lora` first. `train_embeddings: false` keeps the embedding and the head it is tied to as they are, which
saves their moments and keeps rare tokens from drifting.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from luthier.tune.base import Probe, Tuned, Tuning
from luthier.tune.whole import WholeModel


class Full(Tuning):
    """Every parameter moves, the embeddings too unless `train_embeddings` is false."""

    method: Literal["full"] = "full"
    paper: ClassVar[int | None] = None
    default_learning_rate: ClassVar[float] = 2e-5
    train_embeddings: bool = True

    def attach(self, model: nn.Module, probe: Probe) -> Tuned:
        for name, parameter in model.named_parameters():
            region, _ = probe.topology.region(name)
            tied = any(name in group and _holds_embedding(group, probe) for group in probe.topology.tied)
            embedding = region == "embedding" or tied
            parameter.requires_grad_(parameter.is_floating_point() and (self.train_embeddings or not embedding))
        return WholeModel(self, model, model)


def _holds_embedding(group: tuple[str, ...] | list[str], probe: Probe) -> bool:
    return any(probe.topology.region(name)[0] == "embedding" for name in group)
