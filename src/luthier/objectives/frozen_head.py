"""A head that does not move: its gradient is made in the forward pass, so no logits outlive it.

    forward    p_i = log p(label_i | h_i),  J_i = dp_i / dh_i      of a few tokens at a time
    backward   dh_i = g_i J_i                                      g_i: what the loss makes of token i

A token's log-probability depends on its own hidden state alone, so the gradient of the sum over tokens is each one's
own, and the loss scales it afterwards. What is kept is J, as large as the hidden states (tokens, width), in place of
logits (tokens, vocabulary); and the head is multiplied twice instead of three times, as the backward pass need not make
the logits again. Equal to the plain computation but for rounding: J is scaled after it was rounded, not before.

When not to use it: where the head, or anything in it, is trained; its gradient needs the logits and g together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Bytes of float32 logits at a time; on a CPU at least so many tokens that reading the head's weights does not dominate.
_CPU_BYTES, _DEVICE_BYTES = 2**23, 2**27
_CPU_TOKENS = 48

# Hidden states and labels of tokens -> (log-probabilities, and more (tokens,) tensors without gradient).
Score = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def moves(head: nn.Module, hidden: Tensor) -> bool:
    """Whether a gradient of anything but `hidden` (tokens, width) passes through the head: what it says of no token.

    Its parameters do not tell: what is trained in their place may stand elsewhere (`luthier.tune.selector.stand_in`).
    """
    with torch.enable_grad():
        return head.forward(hidden[:0].detach()).requires_grad


def applies(head: nn.Module, hidden: Tensor) -> bool:
    """Whether a gradient is wanted, and of the hidden states alone."""
    return torch.is_grad_enabled() and hidden.requires_grad and not moves(head, hidden)


def tokens_at_a_time(hidden: Tensor, vocabulary: int) -> int:
    """Tokens whose logits are made together."""
    if hidden.device.type == "cpu":
        return max(_CPU_TOKENS, _CPU_BYTES // (4 * vocabulary))
    return max(1, _DEVICE_BYTES // (4 * vocabulary))


def scored(score: Score, hidden: Tensor, labels: Tensor, size: int) -> tuple[Tensor, ...]:
    """What `score` says of all tokens, `size` at a time; its first tensor has a gradient, the others have none.

    Args:
        hidden: (tokens, width) of the head's dtype.
        labels: (tokens,) int64.
    """
    return _Scored.apply(hidden, labels, score, size)


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, score: Score, size: int) -> tuple[Tensor, ...]:
        slopes = torch.empty_like(hidden)
        pieces: list[tuple[Tensor, ...]] = []
        for start in range(0, max(1, len(hidden)), size):
            part = hidden[start : start + size].detach().requires_grad_(True)
            with torch.enable_grad():
                logprobs, *more = score(part, labels[start : start + size])
                (slope,) = torch.autograd.grad(logprobs.sum(), part)
            slopes[start : start + size] = slope
            pieces.append((logprobs.detach(), *more))
            del logprobs, slope, part
        ctx.save_for_backward(slopes)
        first, *rest = (torch.cat(column) for column in zip(*pieces, strict=True))
        ctx.mark_non_differentiable(*rest)
        return first, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * gradient[:, None]).to(slopes.dtype), None, None, None
