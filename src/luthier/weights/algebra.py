"""The algebra of merging, on tiles: pure functions of float32 tensors that leave their inputs as they are.

K models of one base give K differences (deltas), stacked on the first axis: (K, ...). A zero in a trimmed delta means
"says nothing here", so that means and elections are over the models that do say something.

    moved(base, change)         base + change, and where nothing changes the base's very bits (-0.0 too)
    lincomb(models, weights)    sum of w_k m_k
    elect(deltas)               per element the sign with the larger total magnitude
    agree(deltas, signs)        per element the mean (sum, largest) of the deltas that have the elected sign
    slerp(a, b, t, ...)         along the great circle between two directions
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from luthier.later import torch

if TYPE_CHECKING:
    from torch import Tensor

Agg = Literal["mean", "sum", "max"]
_NEGATIVE_ZERO = np.int32(-(2**31))  # its bits


def moved(base: Tensor, change: Tensor) -> Tensor:
    """base + change (any shape, float); an element whose change is 0 keeps the bits of `base`, a negative zero too."""
    total = base + change
    plain = base.dtype == torch.float32 and base.device.type == "cpu"
    if plain and not (base.detach().numpy().view(np.int32) == _NEGATIVE_ZERO).any():
        return total  # only -0.0 + 0.0 is another bit pattern than before
    return torch.where(change == 0, base, total)


def finite(values: Tensor) -> bool:
    """Whether no value is infinite or not a number. One pass over finite values; the sum of huge ones costs two."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def lincomb(models: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum over k of weights[k] models[k]: (K, ...) -> (...). Added in order of k, so the same bits for the same order.

    Models are added two by two in a fixed order; for a result that does not depend on the order to the last bit, sort
    them first.
    """
    total = models[0] * weights[0]
    for model, weight in zip(models[1:], weights[1:], strict=True):
        total.add_(model, alpha=weight)
    return total


def elect(deltas: Tensor, tie: int = 0) -> Tensor:
    """The sign of the sum over models: (K, ...) -> (...) float, -1, 0 or 1; `tie` where the sum is exactly 0.

    The sum of three or more is taken in float64, so that its sign does not depend on the order of the models; that of
    two numbers has the right sign in any precision.
    """
    if len(deltas) < 3:
        signs = deltas.sum(0).sign_()
    else:
        total = deltas[0].double()
        for delta in deltas[1:]:
            total.add_(delta)
        signs = total.sign_().to(deltas.dtype)
    return signs.add_(signs.abs().sub_(1), alpha=-tie) if tie else signs


def balance(signs: Tensor) -> int:
    """How many more 1 than -1 there are; exact for any number of elements."""
    found = signs.detach().cpu().numpy()
    return int(np.count_nonzero(found > 0)) - int(np.count_nonzero(found < 0))


def agree(deltas: Tensor, signs: Tensor, weights: Sequence[float] | None = None, agg: Agg = "mean") -> Tensor:
    """What the models that have the elected sign say: (K, ...), (...) -> (...).

    Args:
        deltas: zeros where a model says nothing; already multiplied by its weight if it has one.
        signs: -1, 0 or 1; where it is 0 the result is 0.
        weights: of the models, for the mean: their sum over those that agree is the divisor; None is 1 each.
        agg: `mean` over those that agree, `sum` of them, or `max`: the largest magnitude among them with the sign.
    """
    # relu(delta * sign) is the magnitude of a delta that agrees, and 0 of any other.
    agreeing = deltas.mul(signs).relu_()
    if agg == "max":
        return agreeing.amax(0).mul_(signs)
    total = lincomb(agreeing, [1.0] * len(agreeing)).mul_(signs)
    if agg == "sum":
        return total
    if weights is None:
        return total.div_(lincomb(agreeing.sign_(), [1.0] * len(agreeing)).clamp_(min=1.0))
    count = lincomb(agreeing.sign_(), weights)
    return total.div_(count.masked_fill_(count == 0, 1.0))


def slerp_factors(
    dot: float, norm_a: float, norm_b: float, t: float, *, threshold: float, geometric: bool
) -> tuple[float, float]:
    """Factors (x, y) of x a + y b on the way from a (t = 0) to b (t = 1), from a.b, |a| and |b| of the whole tensors.

        omega = angle between a and b        x = sin((1-t) omega) / sin(omega),  y = sin(t omega) / sin(omega)

    Plain factors act on a and b as they are; `geometric` ones on their directions, times |a|^(1-t) |b|^t. Where the
    directions agree or oppose by more than `threshold` in cosine, or a tensor is zero, the way is straight: (1-t, t).
    """
    if norm_a == 0 or norm_b == 0:
        return 1 - t, t
    cosine = max(-1.0, min(1.0, dot / (norm_a * norm_b)))
    if abs(cosine) > threshold:
        return 1 - t, t
    omega = math.acos(cosine)
    x, y = math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)
    if geometric:
        length = norm_a ** (1 - t) * norm_b**t
        x, y = x * length / norm_a, y * length / norm_b
    return x, y
