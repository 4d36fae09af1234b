"""Hinge loss on pairs: push until the implied rewards differ by one, then leave the pair alone.

    d = beta (h_w - h_l)        loss of a pair = max(0, 1 - d)

A pair that is told apart by the margin no longer moves the model, so easy pairs do not drag it ever farther from the
reference, as the logistic loss of `dpo` does.

When not to use it: with few pairs and a small beta every pair sits inside the margin, and the loss is linear there: it
pulls each with the same force.

Zhao et al. 2023 (SLiC); in the comparison of Saeidi et al. 2024 as a variant of DPO.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from luthier.objectives.preference import Pairs, Referenced


class Hinge(Referenced):
    """Hinge loss on the difference of implied rewards."""

    method: Literal["hinge"] = "hinge"
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)

    @property
    def reward_scale(self) -> float:
        return self.beta

    def compare(self, pairs: Pairs) -> Tensor:
        return hinge(pairs.lp_w, pairs.lp_l, pairs.rp_w, pairs.rp_l, beta=self.beta)


def hinge(lp_w: Tensor, lp_l: Tensor, rp_w: Tensor, rp_l: Tensor, *, beta: float) -> Tensor:
    """(n,) losses from (n,) summed log-probabilities of chosen and rejected, under the model and the reference."""
    return (1 - beta * ((lp_w - rp_w) - (lp_l - rp_l))).relu()
