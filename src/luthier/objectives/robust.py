"""Robust DPO: DPO whose mean over noisy labels is the loss that clean labels would give.

    d = beta (h_w - h_l)        loss of a pair = [- (1 - eps) log sigmoid(d) + eps log sigmoid(-d)] / (1 - 2 eps)

If a share eps of the pairs has chosen and rejected exchanged, independently of what they say, the expected loss equals
that of the true labels. A single pair's loss can be negative. eps has no default: it is a statement about your data.

When not to use it: if you cannot say how noisy the labels are (`dpo` with a little `label_smoothing` is milder), or eps
nears one half, where the loss blows up.

Chowdhury et al. 2024; in the comparison of Saeidi et al. 2024 as a variant of DPO.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from luthier.objectives.preference import Pairs, Referenced


class Robust(Referenced):
    """DPO corrected for a known share of exchanged labels."""

    method: Literal["robust"] = "robust"
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    label_smoothing: float = Field(gt=0, lt=0.5)

    @property
    def reward_scale(self) -> float:
        return self.beta

    def compare(self, pairs: Pairs) -> Tensor:
        return robust(
            pairs.lp_w, pairs.lp_l, pairs.rp_w, pairs.rp_l, beta=self.beta, label_smoothing=self.label_smoothing
        )


def robust(lp_w: Tensor, lp_l: Tensor, rp_w: Tensor, rp_l: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """(n,) losses from (n,) summed log-probabilities; `label_smoothing` is the share of exchanged labels."""
    d = beta * ((lp_w - rp_w) - (lp_l - rp_l))
    mixed = -(1 - label_smoothing) * F.logsigmoid(d) + label_smoothing * F.logsigmoid(-d)
    return mixed / (1 - 2 * label_smoothing)
