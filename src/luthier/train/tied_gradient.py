"""The gradient of an embedding that is tied to the head: held once instead of three times, and made as late as can be.

A tied weight has two gradients in each pass: the head's, which fills all rows, and the lookup's, which fills the rows
of the batch's tokens. Torch makes the second as large as the first, and a third of that size for their sum: three
matrices of (vocabulary, width). And it makes the head's when the backward pass begins, while all activations are still
held. Here the lookup keeps its few rows to itself, and they are added where they belong:

    e    (different tokens, width)    the lookup's gradient, summed per token in reading order, as torch sums it
    h    (vocabulary, width)          the head's gradient, a product d.T x
    h[tokens] += e                    in place, before the weight's own hooks and its `.grad` see the sum

With fewer labelled tokens than the width, the factors d (tokens, vocabulary) and x (tokens, width) are smaller than
their product; then they are kept until the lookup's own backward pass, the last of all, and multiplied there.

The sums are the same, to the last bit. It holds for torch's own `Embedding` and `Linear` that share one whole weight;
other classes, weights in parts (FSDP2) and a model inside DDP are left to torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from luthier.models.allocator import give_back_freed_memory
from luthier.models.shards import is_sharded


@dataclass
class _Pass:
    """What a pass through the model has kept.

    Attributes:
        rows: of each lookup whose backward pass is done: different tokens, and their gradients.
        factors: of each product of the head whose gradient is still to be multiplied: d and x.
        heads: how often the head ran, with gradient, since the lookup did.
    """

    weight: Tensor
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    heads: int = 0

    def products(self) -> Tensor | None:
        """(vocabulary, width), the head's gradient from all factors that were kept."""
        whole = None
        if self.factors and self.weight.device.type == "cpu":
            give_back_freed_memory()  # the activations', which would else stand beside the product
        while self.factors:
            gradient, fed = self.factors.pop(0)
            part = gradient.t() @ fed
            whole = part if whole is None else whole.add_(part)
        return whole

    def add(self, gradient: Tensor | None) -> None:
        """What the lookups have kept, into the gradient that arrives at the weight."""
        while self.rows:
            tokens, rows = self.rows.pop(0)
            if gradient is None:  # nothing came from the head in this pass
                self._accumulate(torch.zeros_like(self.weight).index_add_(0, tokens, rows))
            else:
                gradient.index_add_(0, tokens, rows)

    def end(self) -> None:
        """At the end of a backward pass that did not reach the lookup, the head's gradient is still to be added."""
        whole = self.products()
        if whole is not None:
            self._accumulate(whole)

    def _accumulate(self, whole: Tensor) -> None:
        self.weight.grad = whole if self.weight.grad is None else self.weight.grad + whole


@contextmanager
def one_tied_gradient(model: nn.Module) -> Iterator[None]:
    """While open, backward passes of `model` make one gradient of the tied embedding's size; others are as ever."""
    found = _tied(model)
    if found is None:
        yield
        return
    embedding, head = found
    kept = _Pass(embedding.weight)

    def look_up(tokens: Tensor) -> Tensor:
        kept.heads = 0
        return _LookUp.apply(embedding.weight, tokens, embedding.padding_idx, embedding.scale_grad_by_freq, kept)

    def score(fed: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or torch.is_autocast_enabled(fed.device.type) or fed.ndim != 2:
            return F.linear(fed, head.weight, head.bias)
        return _Head.apply(head.weight, fed, kept)

    embedding.forward = look_up  # type: ignore[method-assign, assignment]
    if head.bias is None:
        head.forward = score  # type: ignore[method-assign, assignment]
    handle = embedding.weight.register_hook(kept.add)
    try:
        yield
    finally:
        handle.remove()
        for module in (embedding, head):
            module.__dict__.pop("forward", None)


class _LookUp(torch.autograd.Function):
    """Rows of the weight; backward leaves their gradient in `kept`, unless the head's is still to be multiplied."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, tokens: Tensor, padding: int | None, by_frequency: bool, kept: _Pass
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.padding, ctx.by_frequency, ctx.kept = padding, by_frequency, kept
        return torch.embedding(weight, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        different, places = tokens.unique(return_inverse=True)
        rows = torch.ops.aten.embedding_dense_backward(gradient, places, len(different), -1, ctx.by_frequency)
        if ctx.padding is not None:
            rows[different == ctx.padding] = 0
        whole = ctx.kept.products()
        if whole is None:
            ctx.kept.rows.append((different, rows))
        else:
            whole.index_add_(0, different, rows)
        return whole, None, None, None, None


class _Head(torch.autograd.Function):
    """fed @ weight.T; backward keeps the factors of the weight's gradient if this is the pass's only product, and they
    are smaller than it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, fed: Tensor, kept: _Pass) -> Tensor:
        ctx.save_for_backward(weight, fed)
        ctx.kept = kept
        kept.heads += bool(len(fed))
        return F.linear(fed, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, fed = ctx.saved_tensors
        to_fed = gradient @ weight if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[1] and ctx.kept.heads == 1 and len(fed) < fed.shape[1]:
            ctx.kept.factors.append((gradient, fed))
            Variable._execution_engine.queue_callback(ctx.kept.end)  # type: ignore[attr-defined]
            return None, to_fed, None
        return gradient.t() @ fed, to_fed, None


def _tied(model: nn.Module) -> tuple[nn.Embedding, nn.Linear] | None:
    """The embedding and the head of a model whose gradient can be made so."""
    find = getattr(model, "get_input_embeddings", None), getattr(model, "get_output_embeddings", None)
    if None in find:
        return None
    embedding, head = (get() for get in find)  # type: ignore[misc]
    plain = type(embedding) is nn.Embedding and type(head) is nn.Linear
    if not plain or "forward" in embedding.__dict__ or "forward" in head.__dict__:
        return None
    if embedding.weight is not head.weight or embedding.max_norm is not None or embedding.sparse:
        return None
    return (embedding, head) if embedding.weight.requires_grad and not is_sharded([embedding.weight]) else None
