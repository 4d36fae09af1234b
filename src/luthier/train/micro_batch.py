"""One micro-batch: chosen items, laid out by their view and arranged by the objective, as tensors on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from luthier.data.collate import label_batch, pack_batch, pad_batch
from luthier.data.views import LabelledExamples, PairedExamples, View
from luthier.objectives.base import Objective


def micro_batch(
    items: View, indices: Sequence[int], objective: Objective, *, packing: bool, pad_id: int, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of some items, each part under the prefix that `objective.arrange` gives it.

    Beside them stand which sequences are good ones, as `chosen` or `desirable` (sequences,) bool, where the items have
    both kinds, and for pairs with known reference log-probabilities these, as `reference_logprobs`. Without indices it
    carries no label: a device without items still takes part in the step. Items with a class give one label per row.
    """
    if isinstance(items, LabelledExamples):
        made = label_batch(items.labelled(indices), pad_id)
        return {name: tensor.to(device) for name, tensor in made.items()}
    rows, good = items.rows(indices)
    batch: dict[str, Tensor] = {}
    for prefix, sequences in objective.arrange(rows, items.longest).items():
        tensors = pack_batch(sequences) if packing else pad_batch(sequences, pad_id)
        batch |= {prefix + name: tensor for name, tensor in tensors.items()}
    if items.mark is not None:
        batch[items.mark] = torch.tensor(good)
    if isinstance(items, PairedExamples) and items.reference is not None:
        known = items.reference[list(indices)] if indices else np.zeros((1, 2))
        batch["reference_logprobs"] = torch.from_numpy(known.T.flatten()).float()
    return {name: tensor.to(device) for name, tensor in batch.items()}
