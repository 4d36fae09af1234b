"""The log-probability of each label, with one matrix of the logits' size in each pass instead of two and three.

    forward    log p_i = log_softmax(logits_i)[label_i]         of a few rows at a time; the logits are kept
    backward   dlogits_i = g_i (onehot(label_i) - p_i)          of a few rows at a time, into one matrix

`F.cross_entropy` keeps the log-probabilities of the whole vocabulary beside the logits, and makes two more matrices of
that size in its backward pass. Value and gradient are the same here to the last bit: it is the same operation, on rows
that do not know of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits at a time: what stays in a processor's cache, or keeps an accelerator busy.
_CPU_BYTES, _DEVICE_BYTES = 2**20, 2**24


def label_logprobs(logits: Tensor, labels: Tensor, spend: bool = False) -> Tensor:
    """Log-probability of each row's label.

    Args:
        logits: (rows, vocabulary) float.
        labels: (rows,) int64.
        spend: the backward pass makes the gradient in the logits' place, so nobody may need them by then; a second
            backward pass is an error of torch's.

    Returns:
        (rows,) natural log, of the logits' dtype, with gradient.
    """
    return _LabelLogprobs.apply(logits, labels, spend)


class _LabelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, spend: bool) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.spend = spend
        found = logits.new_empty(len(logits))
        for rows in _parts(logits):
            torch.gather(logits[rows].log_softmax(-1), 1, labels[rows, None], out=found[rows, None])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        whole = logits if ctx.spend else torch.empty_like(logits)
        for rows in _parts(logits):
            logprobs = logits[rows].log_softmax(-1)
            of_labels = torch.zeros_like(logprobs).scatter_(1, labels[rows, None], gradient[rows, None])
            whole[rows] = torch.ops.aten._log_softmax_backward_data(of_labels, logprobs, -1, logits.dtype)
        return whole, None, None


def _parts(logits: Tensor) -> Iterator[slice]:
    most = _CPU_BYTES if logits.device.type == "cpu" else _DEVICE_BYTES
    size = max(1, most // max(1, logits.shape[-1] * logits.element_size()))
    return (slice(start, start + size) for start in range(0, len(logits), size))
