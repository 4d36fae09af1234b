"""Two losses on features and logits that hold labelled embeddings together and a model near an older one.

    supervised contrastive   of anchor i:  - 1/|P(i)| sum over p in P(i) of log( exp(z_i.z_p / tau)
                                                                               / sum over a != i of exp(z_i.z_a / tau) )
    consistency              mean over all elements of (logits - logits of the older model)^2

z are embeddings of unit length, P(i) all other embeddings with the label of i, whatever view of whatever example they
come from. The loss is the mean over all anchors; one without another of its label counts 0 in it.

    features   (n, v, d)   n examples, v views of each (of one encoder, or of several), d numbers
    labels     (n,)

Views lie along the second axis, per example. Rows that are stacked view after view and then cut into examples mix the
examples as soon as there are three views; the published code of CoACT does so, we do not.

Sources: Khosla et al. 2020 ("Supervised Contrastive Learning", equation 2), and Roy et al. 2025 (CoACT) for the use
of both in a session. They are plain functions and no entry of a recipe: a recipe's objectives score tokens of
language models. When not to use the first: batches in which most labels stand alone, with one view of each; they
teach nothing then.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.errors import InputError


def supervised_contrastive(features: Tensor, labels: Tensor, tau: float = 0.07) -> Tensor:
    """Scalar: the mean over all n v anchors, in nats; 0 where no two embeddings share a label.

    Args:
        features: (n, v, d) floats of any length, scaled to unit length here; 16-bit ones are raised to float32.
        labels: (n,) whole numbers, one per example.
        tau: temperature, above 0.

    Raises `InputError` for other shapes or a temperature that is not above 0.
    """
    if features.ndim != 3 or not features.numel():
        raise InputError(f"expected features (examples, views, numbers), got {list(features.shape)}", where="features")
    if labels.shape != features.shape[:1]:
        raise InputError(f"{len(features)} examples need as many labels, got {list(labels.shape)}", where="labels")
    if not tau > 0:
        raise InputError(f"expected a temperature above 0, got {tau}", where="tau")
    examples, views, _ = features.shape
    wide = features.float() if features.element_size() < 4 else features
    z = F.normalize(wide.reshape(examples * views, -1), dim=-1)
    if len(z) == 1:
        return (z * 0).sum()
    label = labels.repeat_interleave(views)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    likeness = z @ z.T / tau
    log_share = likeness - likeness.masked_fill(itself, -torch.inf).logsumexp(-1, keepdim=True)
    positive = (label[:, None] == label[None, :]) & ~itself
    of_anchor = torch.where(positive, log_share, torch.zeros_like(log_share)).sum(-1)
    return -(of_anchor / positive.sum(-1).clamp(min=1)).mean()


def consistency(logits: Tensor, older: Tensor) -> Tensor:
    """Scalar: mean over all elements of the squared difference; no gradient reaches `older`.

    Raises `InputError` where the two differ in shape: broadcasting would compare what does not belong together.
    """
    if logits.shape != older.shape or not logits.numel():
        raise InputError(f"expected two equal shapes, got {list(logits.shape)} and {list(older.shape)}", where="logits")
    return F.mse_loss(logits, older.detach())
