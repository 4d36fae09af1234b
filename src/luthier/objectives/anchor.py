"""What the base says to the same rows, as a second loss that holds a tuned model back.

    anchor_loss(logits, base)  =  T^2 CE(softmax(z / T), log_softmax(logits / T))
    z = alpha base + (1 - alpha) logits, as a constant

With alpha 1 and T 1 the gradient is softmax(logits) - softmax(base): zero where the two agree.
A loop of one's own makes both losses from one forward pass and hands them to the tuning:

    with torch.no_grad(), evaluating(model), tuned.untuned():
        base = model(pictures)
    logits = model(pictures)
    anchor = anchor_loss(logits, base, temperature, alpha).mean()
    tuned.backward(F.cross_entropy(logits, labels), anchor)

The loop here does the same, by `BaseAnchor`: at every labelled token, or for every row with a class.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class BaseAnchor:
    """How a forward pass of language-model rows is anchored to the base.

    Attributes:
        base: -> a context in which the model that is called computes what the base does. Its head must be the base's.
        temperature: T, above 0; alpha: share of the base in the target, 0 to 1.
    """

    base: Callable[[], AbstractContextManager[Any] | None]
    temperature: float = 1.0
    alpha: float = 1.0

    def loss(self, logits: Tensor, base: Tensor) -> Tensor:
        """`anchor_loss` with these settings."""
        return anchor_loss(logits, base, self.temperature, self.alpha)


def anchor_loss(logits: Tensor, base: Tensor, temperature: float = 1.0, alpha: float = 1.0) -> Tensor:
    """The anchor's loss of each row, in nats times T^2.

    Args:
        logits: (rows, classes) float, with gradient; base: (rows, classes) float, those of the base.
        temperature: T, above 0; alpha: share of the base in the target, 0 to 1.

    Returns: (rows,) float32 (float64 for float64), at least the entropy of the target times T^2.
    """
    logits, base = (t if t.is_floating_point() and t.element_size() == 8 else t.float() for t in (logits, base))
    target = (alpha * base + (1 - alpha) * logits).detach() / temperature
    return -(target.softmax(-1) * F.log_softmax(logits / temperature, dim=-1)).sum(-1) * temperature**2
