"""The best set of tensors under a budget of backward cost: dynamic programming over quantised costs, exact on those.

Numbers count from the output, C_k = q_dy_1 + .. + q_dy_k is what it takes to bring the gradient down to tensor k, and

    P_k(t) = I_k + max( 0 if q_dw_k + C_k <= t,   max_{j < k} P_j(t - q_dw_k - (C_k - C_j)) )

is the most importance when k is the deepest chosen tensor and the cost is at most t. Costs are counted in quanta, each
rounded down: q = floor(cost quanta / sum of all), and the limit is floor(budget sum of all q). What is chosen can
therefore cost a little more than the budget, at most 2 N (1 - budget) / quanta of the whole backward pass; the share
that is reported is the true one. Tensors below a quantum (norms, biases) are free and taken whenever they help.

A tensor that does not help (I <= 0) is never chosen. Of equal solutions the one found first stays. O(N^2 quanta).

Source: Huang et al., GreenTrainer, ICLR 2024 (arXiv 2309.13192), section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]
_HAIR = 1e-9  # so that 0.3 * 10 is not 2


@dataclass(frozen=True)
class Quantised:
    """Costs in whole quanta, tensors from input to output, and the limit of a choice."""

    dy: Integers
    dw: Integers
    limit: int

    @classmethod
    def of(cls, dy: Floats, dw: Floats, budget: float, quanta: int) -> Quantised:
        """
        Args:
            dy, dw: (tensors,) of at least 0.
            budget: share of the whole backward pass, 0 to 1.
            quanta: how many pieces the whole backward pass is cut into.
        """
        unit = (float(dy.sum() + dw.sum()) or 1.0) / quanta
        q_dy, q_dw = (np.floor(cost / unit + _HAIR).astype(np.int64) for cost in (dy, dw))
        return cls(q_dy, q_dw, limit=int(np.floor(budget * int(q_dy.sum() + q_dw.sum()) + _HAIR)))

    def alone(self) -> Integers:
        """(tensors,) what each costs when nothing else is chosen."""
        return self.dw + np.cumsum(self.dy[::-1])[::-1]

    def fits(self) -> Bools:
        """(tensors,) which can be in any choice at all."""
        return self.alone() <= self.limit

    def cost(self, chosen: Bools) -> int:
        """Of a choice."""
        return int(self.dw[chosen].sum() + self.dy[np.logical_or.accumulate(chosen)].sum())

    def least_budget(self, among: Bools) -> float:
        """The smallest budget under which one of `among` can be chosen."""
        return float(self.alone()[among].min() / max(1, int(self.dy.sum() + self.dw.sum())))


def select_tensors(
    t_dy: Floats, t_dw: Floats, importance: Floats, budget_share: float, quanta: int = 1000
) -> tuple[Bools, float, float]:
    """The choice that is worth most under the budget.

    Args:
        t_dy, t_dw, importance: (tensors,) from input to output.
        budget_share: of the whole backward pass, dy and dw of all tensors.

    Returns (tensors,) bool; the sum of its importance; its true cost, as a share of the whole backward pass. Nothing
    is chosen where nothing fits or nothing helps.
    """
    costs = Quantised.of(t_dy, t_dw, budget_share, quanta)
    dy, dw, worth = costs.dy[::-1], costs.dw[::-1], np.asarray(importance, dtype=np.float64)[::-1]
    down, limit, count = np.cumsum(dy), costs.limit, len(dy)
    best = np.full((count, limit + 1), -np.inf)  # best[k, t] is P_k(t)
    before = np.full((count, limit + 1), -1, dtype=np.int64)
    for k in range(count):
        if down[k] > limit:
            break
        if worth[k] <= 0:
            continue
        row, back = best[k], before[k]
        row[dw[k] + down[k] :] = 0.0
        for j in range(k):
            shift = int(dw[k] + down[k] - down[j])
            if worth[j] <= 0 or shift > limit:
                continue
            candidate = best[j, : limit + 1 - shift]
            better = candidate > row[shift:]
            row[shift:][better] = candidate[better]
            back[shift:][better] = j
        row += worth[k]
    chosen, value = np.zeros(count, dtype=bool), 0.0
    at, left = -1, limit
    for k in range(count):
        if best[k, limit] > value:
            at, value = k, float(best[k, limit])
    while at >= 0:
        chosen[at] = True
        deeper, at = at, int(before[at, left])
        left -= int(dw[deeper] + down[deeper] - (down[at] if at >= 0 else 0))
    chosen = chosen[::-1].copy()
    true = float(t_dw[chosen].sum() + t_dy[np.logical_or.accumulate(chosen)].sum())
    return chosen, value, true / (float(t_dy.sum() + t_dw.sum()) or 1.0)
