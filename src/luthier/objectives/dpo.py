"""Direct preference optimisation (DPO): raise the chosen answer over the rejected one, measured from the reference.

    d = beta (h_w - h_l)        loss of a pair = - (1 - eps) log sigmoid(d) - eps log sigmoid(-d)

d is the difference of the rewards that the model implies; beta says how dearly leaving the reference is paid (smaller:
farther). `label_smoothing` (eps) assumes that this share of the labels is wrong and keeps d finite; `robust` corrects
for it instead. The gradient of a pair's loss by lp_w is -beta sigmoid(-d) where eps is 0.

When not to use it: if the answers differ much in length and length is not what was preferred (see `simpo`, `ipo`), or
if the labels are noisy (`robust`, `ipo`).

Rafailov et al. 2023; compared with its variants in Saeidi et al. 2024.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from luthier.objectives.preference import Pairs, Referenced


class Dpo(Referenced):
    """Logistic loss on the difference of implied rewards."""

    method: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    label_smoothing: float = Field(default=0.0, ge=0, le=0.5)

    @property
    def reward_scale(self) -> float:
        return self.beta

    def compare(self, pairs: Pairs) -> Tensor:
        return dpo(pairs.lp_w, pairs.lp_l, pairs.rp_w, pairs.rp_l, beta=self.beta, label_smoothing=self.label_smoothing)


def dpo(lp_w: Tensor, lp_l: Tensor, rp_w: Tensor, rp_l: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """(n,) losses from (n,) summed log-probabilities of chosen and rejected, under the model and the reference."""
    d = beta * ((lp_w - rp_w) - (lp_l - rp_l))
    return -(1 - label_smoothing) * F.logsigmoid(d) - label_smoothing * F.logsigmoid(-d)
