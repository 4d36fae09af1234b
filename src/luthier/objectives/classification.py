"""Classification: make the class of a row probable.

    loss = - sum over rows of log softmax(logits)[class]

divided by the loop by the number of rows in the whole optimiser step. It learns from rows with a class (`text` or
`image`, and the column that `data.label_key` names) and needs a model that gives (rows, classes) logits: an encoder, a
vision model or a language model with a label head, or what a tuning such as `levi` makes of any of them.

A model whose loss on a row is another one than the cross-entropy of its logits says so by a method `row_losses(output,
labels)`, (rows,) in nats; `levi`, which also teaches the members of its ensemble, does.

When not to use it: for several classes per row at a time, or for numbers to regress on; there is no such objective.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.errors import InputError
from luthier.models.modes import evaluating
from luthier.objectives.anchor import BaseAnchor
from luthier.objectives.base import Loss, Needs, Objective
from luthier.objectives.batch import Batch, labelled
from luthier.objectives.logprobs import unwrapped


class Classification(Objective):
    """Negative log-likelihood of the rows' classes, in nats; reports `accuracy`, the share that was the likeliest."""

    method: Literal["classification"] = "classification"
    paper: ClassVar[int | None] = None

    def needs(self) -> Needs:
        return Needs(learns_from=("labelled",))

    def units(self, batch: Batch) -> dict[str, float]:
        return {"row": float(labelled(batch["labels"]).sum())}

    def loss(
        self, model: nn.Module, batch: Batch, credit: Tensor | None = None, anchor: BaseAnchor | None = None
    ) -> Loss:
        """See `Objective.loss`; `batch` is that of a classifier. Raises `InputError` if the model gives no logits of
        classes, or a label lies outside of them."""
        if credit is not None:
            raise InputError("classification has no answers to give credit to", fix="use objective: sft")
        labels, chosen = batch["labels"], labelled(batch["labels"])
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        base: Tensor | None = None
        if anchor is not None:
            with torch.no_grad(), evaluating(model), anchor.base() or nullcontext():
                base = model(**inputs).logits.float()
        output = model(**inputs)
        logits = class_logits(output, labels, chosen)
        own = getattr(unwrapped(model), "row_losses", None)
        targets = torch.where(chosen, labels, 0)  # what a row without a label is held against counts nothing
        losses = F.cross_entropy(logits, targets, reduction="none") if own is None else own(output, targets)
        losses, rows = losses[chosen], float(chosen.sum())
        right = float((logits.argmax(-1) == labels)[chosen].sum())
        metrics = {"accuracy": (right, rows)}
        held = None
        if anchor is not None and base is not None:
            held = anchor.loss(logits, base)[chosen].sum()
            metrics["anchor_loss"] = (float(held.detach()), rows)
        return Loss({"row": losses.sum()}, {"row": rows}, metrics, held)


def class_logits(output: Any, labels: Tensor, chosen: Tensor) -> Tensor:
    """(rows, classes) float32 of a model's output; `InputError` if they are no such thing, or too few for `labels`.

    Args:
        labels: (rows,) int64; chosen: (rows,) bool, which of them count.
    """
    logits = getattr(output, "logits", None)
    if logits is None or logits.ndim != 2 or len(logits) != len(labels):
        got = "no logits" if logits is None else f"logits of shape {list(logits.shape)}"
        raise InputError(
            f"the model gives {got} for {len(labels)} rows, and classification needs (rows, classes)",
            where="objective",
            fix="take a model with a label head (model.kind: sequence-classifier or image-classifier), or levi",
        )
    counted = labels[chosen]
    if len(counted) and not 0 <= int(counted.min()) <= int(counted.max()) < logits.shape[1]:
        raise InputError(
            f"a label lies outside the model's {logits.shape[1]} classes, 0 to {logits.shape[1] - 1}",
            where="labels",
            fix="give the model as many labels as there are classes",
        )
    return logits.float()
