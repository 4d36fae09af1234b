"""The gradient of an embedding that is tied to the head, held once instead of three times.

A tied weight has two gradients in each pass: the head's, which fills all rows, and the lookup's, which fills the rows
of the batch's tokens. Torch makes the second as large as the first, and a third of that size for their sum: three
matrices of (vocabulary, width) at the end of the backward pass. Here the lookup keeps its few rows to itself, and they
are added where they belong when the head's gradient arrives at the weight:

    e    (different tokens, width)    the lookup's gradient, summed per token in reading order, as torch sums it
    h    (vocabulary, width)          the head's gradient
    h[tokens] += e                    in place, before the weight's own hooks and its `.grad` see the sum

The sums are the same, to the last bit. It holds for torch's own `Embedding` and `Linear` that share one whole weight;
other classes, weights in parts (FSDP2) and a model inside DDP are left to torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.models.shards import is_sharded

Rows = list[tuple[Tensor, Tensor]]  # of each lookup whose backward pass is done: different tokens, their gradients


@contextmanager
def one_tied_gradient(model: nn.Module) -> Iterator[None]:
    """While open, backward passes of `model` make one gradient of the tied embedding's size; others are as ever."""
    embedding = _tied(model)
    if embedding is None:
        yield
        return
    kept: Rows = []

    def look_up(tokens: Tensor) -> Tensor:
        return _LookUp.apply(embedding.weight, tokens, embedding.padding_idx, embedding.scale_grad_by_freq, kept)

    def add(gradient: Tensor | None) -> None:
        while kept:
            tokens, rows = kept.pop(0)
            if gradient is None:  # nothing came from the head in this pass
                whole = torch.zeros_like(embedding.weight).index_add_(0, tokens, rows)
                embedding.weight.grad = whole if embedding.weight.grad is None else embedding.weight.grad + whole
            else:
                gradient.index_add_(0, tokens, rows)

    embedding.forward = look_up  # type: ignore[method-assign, assignment]
    handle = embedding.weight.register_hook(add)
    try:
        yield
    finally:
        handle.remove()
        del embedding.forward


class _LookUp(torch.autograd.Function):
    """Rows of the weight; backward leaves their gradient in `kept`, and gives none to the weight."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, tokens: Tensor, padding: int | None, by_frequency: bool, kept: Rows
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.padding, ctx.by_frequency, ctx.kept = padding, by_frequency, kept
        return torch.embedding(weight, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        (tokens,) = ctx.saved_tensors
        different, places = tokens.unique(return_inverse=True)
        rows = torch.ops.aten.embedding_dense_backward(gradient, places, len(different), -1, ctx.by_frequency)
        if ctx.padding is not None:
            rows[different == ctx.padding] = 0
        ctx.kept.append((different, rows))
        return None, None, None, None, None


def _tied(model: nn.Module) -> nn.Embedding | None:
    """The embedding of a model whose gradient can be made so."""
    find = getattr(model, "get_input_embeddings", None), getattr(model, "get_output_embeddings", None)
    if None in find:
        return None
    embedding, head = (get() for get in find)  # type: ignore[misc]
    plain = type(embedding) is nn.Embedding and type(head) is nn.Linear and "forward" not in embedding.__dict__
    if not plain or embedding.weight is not head.weight or embedding.max_norm is not None or embedding.sparse:
        return None
    return embedding if embedding.weight.requires_grad and not is_sharded([embedding.weight]) else None
