"""Identity preference optimisation (IPO): bring the pair's margin to a set size, and no farther.

    loss of a pair = (h_w / n_w - h_l / n_l - 1 / (2 beta))^2

A squared distance has its minimum at a finite margin, so labels that always agree do not push the model without end.
With `length_normalised: false` the margin is that of the sums, as the paper prints it; with it (as TRL does, after its
authors) it is per token, and the same beta asks for much more.

When not to use it: to carry over a beta from `dpo`; it does not mean the same here.

Azar et al. 2023; compared in Saeidi et al. 2024.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from luthier.objectives.preference import Pairs, Referenced


class Ipo(Referenced):
    """Squared distance of the margin from 1 / (2 beta)."""

    method: Literal["ipo"] = "ipo"
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    length_normalised: bool = True

    @property
    def reward_scale(self) -> float:
        return self.beta

    def compare(self, pairs: Pairs) -> Tensor:
        vectors = (pairs.lp_w, pairs.lp_l, pairs.rp_w, pairs.rp_l, pairs.n_w, pairs.n_l)
        return ipo(*vectors, beta=self.beta, length_normalised=self.length_normalised)


def ipo(
    lp_w: Tensor,
    lp_l: Tensor,
    rp_w: Tensor,
    rp_l: Tensor,
    n_w: Tensor,
    n_l: Tensor,
    *,
    beta: float,
    length_normalised: bool,
) -> Tensor:
    """(n,) losses from (n,) summed log-probabilities and (n,) numbers of tokens (float, at least 1)."""
    h_w, h_l = lp_w - rp_w, lp_l - rp_l
    if length_normalised:
        h_w, h_l = h_w / n_w, h_l / n_l
    return (h_w - h_l - 1 / (2 * beta)) ** 2
