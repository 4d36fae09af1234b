"""Contrastive preference optimisation (CPO): DPO without a reference, held in place by the chosen answers' likelihood.

    c = beta (lp_w - lp_l)
    loss of a pair = - (1 - eps) log sigmoid(c) - eps log sigmoid(-c),  plus  cpo_alpha * NLL

NLL is minus the mean log-probability of the chosen answers' tokens, one mean over the whole optimiser step. Without it
nothing keeps the chosen answers themselves from becoming unlikely. With `cpo_alpha: 0` it is DPO under a reference that
finds all answers equally likely. No reference: half the work of DPO, and no second model.

When not to use it: if the start must not be left far behind; only a reference measures that. Long answers have low
sums, so a preference for short ones is built in (`simpo` divides it out).

Xu et al. 2024; compared in Saeidi et al. 2024.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from luthier.objectives.preference import Pairs, WithLikelihood


class Cpo(WithLikelihood):
    """Logistic loss on the difference of summed log-probabilities, plus the chosen answers' NLL."""

    method: Literal["cpo"] = "cpo"
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    cpo_alpha: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    label_smoothing: float = Field(default=0.0, ge=0, le=0.5)

    @property
    def reward_scale(self) -> float:
        return self.beta

    @property
    def likelihood_weight(self) -> float:
        return self.cpo_alpha

    def compare(self, pairs: Pairs) -> Tensor:
        return cpo(pairs.lp_w, pairs.lp_l, beta=self.beta, label_smoothing=self.label_smoothing)


def cpo(lp_w: Tensor, lp_l: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """(n,) losses from (n,) summed log-probabilities, without the NLL, which has a unit of its own."""
    c = beta * (lp_w - lp_l)
    return -(1 - label_smoothing) * F.logsigmoid(c) - label_smoothing * F.logsigmoid(-c)
