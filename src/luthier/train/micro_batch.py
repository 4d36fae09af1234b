"""One micro-batch: chosen examples, arranged by the objective, as tensors on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.data.collate import pack_batch, pad_batch
from luthier.data.encode import Encoded
from luthier.data.pairs import PairedExamples
from luthier.objectives.base import IGNORED, Objective


def micro_batch(
    examples: Any, indices: list[int], objective: Objective, *, packing: bool, pad_id: int, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of `examples[i] for i in indices`, each part under the prefix that `objective.arrange` gives it.

    Without indices it is a micro-batch that carries no label: a device without rows still takes part in the step.
    Pairs with known reference log-probabilities bring them along as `reference_logprobs`.
    """
    chosen = [examples[i] for i in indices]
    if not indices:
        first: Any = examples[0][0] if objective.pairs else examples[0]
        ids = list(first["input_ids"])[:2]
        empty: Encoded = {"input_ids": ids, "labels": [IGNORED] * len(ids)}
        chosen = [(empty, empty)] if objective.pairs else [empty]
    batch: dict[str, Tensor] = {}
    for prefix, rows in objective.arrange(chosen).items():
        tensors = pack_batch(rows) if packing else pad_batch(rows, pad_id)
        batch |= {prefix + name: tensor for name, tensor in tensors.items()}
    if isinstance(examples, PairedExamples) and examples.reference is not None:
        known = examples.reference[indices] if indices else np.zeros((1, 2))
        batch["reference_logprobs"] = torch.from_numpy(known.T.flatten()).float()
    return {name: tensor.to(device) for name, tensor in batch.items()}
