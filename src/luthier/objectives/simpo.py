"""SimPO: compare mean log-probabilities per token, as generation does, and ask for a margin; no reference.

    c = beta (lp_w / n_w - lp_l / n_l) - gamma        loss of a pair = - log sigmoid(c),  plus  cpo_alpha * NLL

Dividing by the length removes the reward for being short (or long). gamma is the margin by which the chosen answer must
win. beta is larger than elsewhere (2, not 0.1), since means per token differ little. `cpo_alpha` adds the chosen
answers' NLL as in `cpo`; SimPO itself has none.

When not to use it: on tiny sets or for many epochs without `cpo_alpha`: nothing else holds the model in place.

Meng et al. 2024; here beside the methods that Saeidi et al. 2024 compare.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from luthier.objectives.preference import Pairs, WithLikelihood


class Simpo(WithLikelihood):
    """Logistic loss on the difference of mean token log-probabilities with a margin."""

    method: Literal["simpo"] = "simpo"
    beta: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    gamma: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    cpo_alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @property
    def reward_scale(self) -> float:
        return self.beta

    @property
    def likelihood_weight(self) -> float:
        return self.cpo_alpha

    def compare(self, pairs: Pairs) -> Tensor:
        return simpo(pairs.lp_w, pairs.lp_l, pairs.n_w, pairs.n_l, beta=self.beta, gamma=self.gamma)


def simpo(lp_w: Tensor, lp_l: Tensor, n_w: Tensor, n_l: Tensor, *, beta: float, gamma: float) -> Tensor:
    """(n,) losses from (n,) summed log-probabilities and (n,) numbers of tokens, without the NLL."""
    return -F.logsigmoid(beta * (lp_w / n_w - lp_l / n_l) - gamma)
