"""ORPO: supervised tuning on the chosen answers plus a penalty on the odds of the rejected ones; no reference.

    a = lp / n        o = (a_w - a_l) - (log(1 - exp a_w) - log(1 - exp a_l))
    loss = NLL - lam log sigmoid(o)

o is the logarithm of the odds ratio of the two answers' mean token probabilities. The NLL carries the learning, so it
tunes a pre-trained model in one stage, without supervised tuning before. `nll_over: answer` takes the NLL over the
chosen answers' tokens (the paper); `all` over prompts too (TRL).

When not to use it: after a supervised stage on the same answers, where the NLL has nothing left to teach.

Hong et al. 2024; here beside the methods that Saeidi et al. 2024 compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from luthier.data.encode import Encoded
from luthier.objectives.preference import Pairs, WithLikelihood


class Orpo(WithLikelihood):
    """NLL of the chosen answers and the log odds ratio."""

    method: Literal["orpo"] = "orpo"
    lam: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    nll_over: Literal["answer", "all"] = "answer"

    @property
    def reward_scale(self) -> float:
        return self.lam

    @property
    def likelihood_weight(self) -> float:
        return 1.0

    @property
    def widens_labels(self) -> bool:
        return self.nll_over == "all"

    def arrange(self, rows: Sequence[Encoded], longest: int | None = None) -> dict[str, list[Encoded]]:
        rows, n = list(rows), len(rows) // 2
        if self.nll_over == "answer" or not any(label >= 0 for row in rows for label in row["labels"]):
            return {"": rows}
        chosen: list[Encoded] = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows[:n]]
        return {"": chosen + rows[n:], "answer_": rows}

    def compare(self, pairs: Pairs) -> Tensor:
        return orpo(pairs.lp_w, pairs.lp_l, pairs.n_w, pairs.n_l, lam=self.lam)


def orpo(lp_w: Tensor, lp_l: Tensor, n_w: Tensor, n_l: Tensor, *, lam: float) -> Tensor:
    """(n,) odds-ratio losses from (n,) summed log-probabilities and (n,) numbers of tokens, without the NLL."""
    a_w, a_l = lp_w / n_w, lp_l / n_l
    return -lam * F.logsigmoid((a_w - a_l) - (log1mexp(a_w) - log1mexp(a_l)))


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - exp(a)) for a < 0, exact near 0 as well; a is kept below -1e-7, where its value is -16."""
    a = a.clamp(max=-1e-7)
    near = a > -0.6931472
    close, far = torch.where(near, a, -0.5), torch.where(near, -1.0, a)  # so that neither branch's gradient is NaN
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))
