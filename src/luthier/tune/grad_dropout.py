"""Gradient dropout between two losses: follow the first, the less surely the more the second disagrees.

    a, b   gradients of the two losses at one parameter
    P      = ( sign(a) (a + b) / (|a| + |b| + 1e-8) + 1 ) / 2      1 where signs agree, |a| / (|a| + |b|) where not
    g      = ( (1 - lam) + lam 1[P > U] ) a                         U uniform in [0, 1), one draw for each element

Only the direction of `a` is ever followed. `lam` 0 is the first loss alone; 1 drops an element wholly where it loses
its draw; between, it goes on with (1 - lam) of its gradient. Nothing here knows what the losses are.

The 1e-8 stands beside the gradients themselves: where both are far smaller than that, P is near one half although
they agree. Scale both up (as a loss scaler does) if that matters.

When not to use it: where the second loss shall be lowered as such; add it to the first then.

Source: Zheng et al., Regularized Mask Tuning, ICCV 2023 (arXiv 2307.15049), and its published code.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_probability(a: Tensor, b: Tensor) -> Tensor:
    """P of each element, in [0, 1]; 0.5 where `a` is 0. Shape and type of `a`."""
    return (a.sign() * (a + b) / (a.abs() + b.abs() + 1e-8) + 1) / 2


def grad_dropout(a: Tensor, b: Tensor, lam: float, generator: torch.Generator) -> Tensor:
    """The gradient to follow, a new tensor of the shape and type of `a`; `a` itself, bit for bit, if `lam` is 0.

    Args:
        a: gradient of the loss to follow; b: of the other one, in the same shape.
        lam: how much is dropped, 0 to 1.
        generator: of the draws, which are made on its device, in C order.
    """
    draws = torch.rand(a.shape, generator=generator, device=generator.device).to(a.device)
    return torch.where(keep_probability(a, b) > draws, a, (1 - lam) * a)
