"""What a tuning may look at before it is attached: micro-batches of the run's own rows, and the run's own loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from luthier.data.batches import plan_epoch
from luthier.data.views import Examples, view
from luthier.models.topology import Topology
from luthier.objectives.base import Objective
from luthier.train.micro_batch import micro_batch
from luthier.train.settings import TrainSettings
from luthier.train.span import Span
from luthier.tune.base import Probe


def probe_of(
    topology: Topology,
    objective: Objective,
    settings: TrainSettings,
    examples: Examples,
    *,
    seed: int = 0,
    pad_id: int = 0,
    packing: bool = False,
) -> Probe:
    """A probe whose batches are the micro-batches of the first epoch, one after the other, made as they are asked for.

    They are those of a run on one device: the same on every one of several. The loss is the objective's mean on one
    micro-batch. An objective that compares with a reference cannot be asked before the run; its probe has no batches.
    """
    needs = objective.needs()
    if needs.reference or not len(examples):
        return Probe(topology, seed)
    items = view(examples, needs.learns_from, objective.method)

    def batches() -> Iterator[dict[str, Tensor]]:
        plan = plan_epoch(
            items.lengths,
            seed=seed,
            epoch=0,
            rows_per_step=Span.of(settings, len(items)).rows_per_step,
            tokens_per_batch=settings.max_tokens_per_device,
            ranks=1,
            bucketing=settings.group_by_length,
            packing=packing,
        )
        for (only,) in plan:
            for indices in only:
                yield micro_batch(items, indices, objective, packing=packing, pad_id=pad_id, device=torch.device("cpu"))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        device = next(model.parameters()).device
        return objective.loss(model, {name: tensor.to(device) for name, tensor in batch.items()}).value()

    return Probe(topology, seed, batches, loss)
