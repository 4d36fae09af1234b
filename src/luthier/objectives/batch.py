"""What stands in a batch, and which of its tokens belong to which sequence.

A batch is a mapping of tensors as `luthier.data.collate` makes them: `input_ids`, `labels` (rows, length) int64, and
where needed `attention_mask` or `position_ids` of the same shape. More sequences than one may stand in a row (packing);
they are counted through the whole batch, row by row. Other tensors have an entry for each sequence:

    chosen, desirable      bool: good ones and bad ones, where the examples are pairs, or judged answers
    reference_logprobs     float: summed log-probability of the answer under the reference
    <prefix>input_ids ...  a further part of the batch with sequences of its own, as an objective's `arrange` asks for
    answer_labels          where the labels are wider than the answers (a prompt is learned too), those of the answers

A batch for a classifier has one label per row: `labels` (rows,) int64, with `input_ids` and `attention_mask`, or with
`pixel_values` (rows, channels, height, width) float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

IGNORED = -100  # the label of a position that carries no loss, as everywhere in transformers

Batch = Mapping[str, Tensor]

_MODEL_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")


def labelled(labels: Tensor) -> Tensor:
    """Which positions predict a label: (rows, length) int64 -> (rows, length - 1) bool.

    Position i predicts `labels[:, i + 1]`, so the first label of a row never counts. Of labels of whole rows, (rows,),
    it says which rows have one.
    """
    if labels.ndim == 1:
        return labels != IGNORED
    return labels[:, 1:] != IGNORED


def sequence_index(batch: Batch) -> Tensor:
    """Which sequence each predicted token belongs to: (rows, length - 1) int64, counted through the whole batch.

    A row is one sequence unless `position_ids` restart inside it (packing), where each restart begins a new one.
    """
    starts = _starts(batch)
    return (starts.flatten().cumsum(0) - 1).view_as(starts)[:, 1:]


def sequence_count(batch: Batch) -> int:
    """How many sequences the batch holds."""
    return int(_starts(batch).sum())


def good(batch: Batch) -> Tensor | None:
    """(sequences,) bool, which sequences are fit to be imitated; None if all are."""
    return batch.get("chosen", batch.get("desirable"))


def part(batch: Batch, prefix: str) -> dict[str, Tensor]:
    """What the model takes of one part of a batch, and its labels, without `prefix`."""
    return {name: batch[prefix + name] for name in _MODEL_COLUMNS if prefix + name in batch}


def narrow(batch: Batch) -> Batch:
    """The batch with the labels of the answers alone."""
    if "answer_labels" not in batch:
        return batch
    kept = {name: tensor for name, tensor in batch.items() if not name.startswith("answer_")}
    return kept | {"labels": batch["answer_labels"]}


def _starts(batch: Batch) -> Tensor:
    """(rows, length) int64, 1 where a sequence begins."""
    starts = torch.zeros_like(batch["labels"])
    starts[:, 0] = 1
    if "position_ids" in batch:
        starts = torch.where(batch["position_ids"] == 0, 1, starts)
    return starts
