"""Dynamic logits fusion: small tuned experts steer a large model, with weights found anew at every token.

    P~_a  =  softmax( M_L + sum_t a_t (M_t - M_S) )
    a*    =  argmin_a  sum_t [ (KL(P~_a || P) - KL(Q_t || Q))^2  +  (KL(P || P~_a) - KL(Q || Q_t))^2 ]

P, Q and Q_t are the distributions of `base` (large, logits M_L), `tuned_base` (small, M_S) and expert t (M_t). The
idea: the large model should move as far from itself as each expert moved from its own base, both ways round. With a
weight of 1 throughout this is EFT (`luthier.decode.eft`); here nothing is picked by hand and no data is needed.

The search is a grid: a = 0, grid_step, ... up to grid_max. Several experts are tried one at a time, the others at 0,
and the best pair of expert and weight stays, so one expert at most acts on a token; the objective sums over all of
them. Ties keep the smaller weight, then the earlier expert. `joint` (ours) goes on from there: one weight after the
other over the grid, at most two sweeps, and only what is strictly better stays. KL sums over all tokens, before
temperature and top-p, in float32 from log-softmax. Divergences grow along one expert, so the objective mostly has one
valley, but not always: the whole grid is tried.

Candidates are tried `BUDGET` numbers at a time (weights x rows x vocabulary): at a vocabulary of 150k and 16 rows
seven weights at once. About four such tensors live together, 256 MiB, however fine the grid and however many the rows.

What the trace shows, by token: `weights` (T), `objective`, `kl_mixture_base`, `kl_base_mixture`, and of each expert
`kl_tuned_base` and `kl_base_tuned` (T), in nats. The paper's printed pseudo-code keeps the smallest objective from one
token to the next; that is a slip, and it starts anew here.

When not to use it: the objective compares how far models moved, not whether an expert knows the question; with experts
that move far everywhere it may pick the wrong one (see the proof). Each step runs 2 + T models.

Fan et al., NeurIPS 2024 (arXiv 2406.15480). Proof: luthier prove 49.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import field_validator, model_validator
from torch import Tensor

from luthier.decode.base import FLOOR, Decoder, Model, Step, Term, normalised
from luthier.errors import InputError

BUDGET = 2**24  # float32 numbers in one tensor of candidates
SWEEPS = 2
MOST_VALUES = 1001


class DynamicFusion(Decoder):
    """Dynamic logits fusion.

    Attributes:
        base: the large model that is steered.
        tuned: a small tuned model, or several experts.
        tuned_base: what the experts were before they were tuned.
        grid_max: the largest weight; one for each of `tuned` if they shall differ.
        grid_step: distance of the weights that are tried; weights are its multiples up to `grid_max`.
        joint: whether several experts may act on one token.
    """

    method: Literal["dynamic-fusion"] = "dynamic-fusion"
    paper: ClassVar[int | None] = 49
    base: Model
    tuned: Model | tuple[Model, ...]
    tuned_base: Model
    grid_max: float | tuple[float, ...] = 2.0
    grid_step: float = 0.1
    joint: bool = False

    @field_validator("tuned", "grid_max", mode="before")
    @classmethod
    def _list_is_several(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fits(self) -> DynamicFusion:
        if self.tuned is None or self.tuned == ():
            raise ValueError("tuned names no model")
        if not (self.grid_step > 0 and math.isfinite(self.grid_step)):
            raise ValueError(f"grid_step must be above 0 and finite, got {self.grid_step}")
        several = len(self._experts)
        ends = self._ends
        if len(ends) != several:
            raise ValueError(f"grid_max has {len(ends)} numbers for {several} tuned models")
        for end in ends:
            if not (end >= 0 and math.isfinite(end)):
                raise ValueError(f"grid_max must be 0 or more and finite, got {end}")
            if end / self.grid_step > MOST_VALUES - 1:
                raise ValueError(f"grid_max {end} in steps of {self.grid_step} is more than {MOST_VALUES} weights")
        return self

    @property
    def _experts(self) -> dict[str, Model]:
        if not isinstance(self.tuned, tuple):
            return {"tuned": self.tuned}
        return {f"tuned_{number}": model for number, model in enumerate(self.tuned, start=1)}

    @property
    def _ends(self) -> tuple[float, ...]:
        return self.grid_max if isinstance(self.grid_max, tuple) else (self.grid_max,) * len(self._experts)

    @property
    def grids(self) -> list[list[float]]:
        """The weights that are tried, by expert: multiples of `grid_step` from 0 to `grid_max`, rising."""
        counts = [math.floor(end / self.grid_step + 1e-9) + 1 for end in self._ends]
        return [[round(i * self.grid_step, 12) for i in range(count)] for count in counts]

    def terms(self) -> dict[str, Term]:
        experts = {name: Term(model, on="tuned_base") for name, model in self._experts.items()}
        return {"base": Term(self.base), "tuned_base": Term(self.tuned_base), **experts}

    def scores(self, step: Step) -> Tensor:
        large, small, *experts = (step.logprobs(name) for name in self.terms())
        out = _ruled_out(dict(zip(self.terms(), (large, small, *experts), strict=True)))
        found = fuse(large, small, experts, self.grids, joint=self.joint)
        step.trace |= {
            "weights": found.weights,
            "objective": found.objective,
            "kl_mixture_base": found.kl_mixture_base,
            "kl_base_mixture": found.kl_base_mixture,
            "kl_tuned_base": found.kl_tuned_base,
            "kl_base_tuned": found.kl_base_tuned,
        }
        return found.logprobs.masked_fill_(out, -math.inf)


@dataclass(frozen=True)
class Fused:
    """What a search found for N contexts and T experts.

    Attributes:
        logprobs: (N, vocabulary) float32, of the mixture with the best weights.
        weights: (N, T) float32, on the grid.
        objective: (N,) float32 at these weights, in nats squared; 0 is best.
        kl_mixture_base: (N,) KL(P~ || P) in nats; `kl_base_mixture` the other way round.
        kl_tuned_base: (N, T) KL(Q_t || Q) in nats; `kl_base_tuned` the other way round.
    """

    logprobs: Tensor
    weights: Tensor
    objective: Tensor
    kl_mixture_base: Tensor
    kl_base_mixture: Tensor
    kl_tuned_base: Tensor
    kl_base_tuned: Tensor


def fuse(
    large: Tensor, small: Tensor, experts: list[Tensor], grids: list[list[float]], *, joint: bool = False
) -> Fused:
    """The best weights of each row, and their mixture.

    Args:
        large, small, experts: (N, vocabulary) float32 log-probabilities each, nats; -inf only where all have it.
        grids: rising weights to try, by expert, each from 0.
        joint: improve the best single expert one weight after the other.
    """
    rows = max(1, BUDGET // max(1, large.shape[1]))
    parts = []
    for at in range(0, max(1, len(large)), rows):  # whole texts have many rows
        here = slice(at, at + rows)
        search = _Search(large[here], small[here], [expert[here] for expert in experts], grids)
        search.singles()
        if joint:
            search.sweeps()
        parts.append(search.outcome())
    if len(parts) == 1:
        return parts[0]
    return Fused(**{name: torch.cat([getattr(part, name) for part in parts]) for name in Fused.__dataclass_fields__})


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of log-probabilities (..., vocabulary), in nats: (...,). All must be finite."""
    return (first.exp() * (first - second)).sum(-1)


class _Search:
    """The best weights so far of some rows."""

    def __init__(self, large: Tensor, small: Tensor, experts: list[Tensor], grids: list[list[float]]):
        # The floor stands for -inf: such a token has probability 0 in all, so it adds nothing to a divergence.
        self.large, small = large.clamp(min=FLOOR), small.clamp(min=FLOOR)
        experts = [expert.clamp(min=FLOOR) for expert in experts]
        self.p = self.large.exp()
        self.moves = [expert - small for expert in experts]
        self.grids = grids
        self.there = torch.stack([kl(expert, small) for expert in experts])  # (T, N)
        self.back = torch.stack([kl(small, expert) for expert in experts])
        count = len(large)
        self.weights = large.new_zeros(len(experts), count)
        self.objective = large.new_full((count,), math.inf)
        self.kl_there, self.kl_back = large.new_zeros(2, count)

    def singles(self) -> None:
        """One expert at a time; weight 0 is the same for all and goes to the first."""
        nothing = torch.zeros_like(self.weights)
        for number, grid in enumerate(self.grids):
            self._try(self.large, nothing, number, grid if number == 0 else grid[1:])

    def sweeps(self) -> None:
        """Coordinate descent from where it stands."""
        for _ in range(SWEEPS):
            before = self.weights
            for number, grid in enumerate(self.grids):
                held = self.weights.clone()
                held[number] = 0.0
                self._try(self._mixed(held), held, number, grid)
            if torch.equal(self.weights, before):
                break

    def _mixed(self, weights: Tensor) -> Tensor:
        """(N, vocabulary) the sum, not normalised, for weights (T, N)."""
        found = self.large.clone()
        for weight, move in zip(weights, self.moves, strict=True):
            found.addcmul_(weight[:, None], move)
        return found

    def _try(self, start: Tensor, held: Tensor, number: int, grid: list[float]) -> None:
        """Every weight of `grid` for one expert, on top of `start`; keeps what is strictly better, row by row.

        Args:
            start: (N, vocabulary) the sum without this expert.
            held: (T, N) the weights that `start` stands for.
        """
        at_once = max(1, BUDGET // max(1, start.numel()))
        for first in range(0, len(grid), at_once):
            weights = start.new_tensor(grid[first : first + at_once])
            tried = torch.log_softmax(start + weights[:, None, None] * self.moves[number], dim=-1)
            away = tried - self.large  # log-softmax differences
            there, back = (tried.exp_() * away).sum(-1), -(self.p * away).sum(-1)  # (weights, N)
            objective = ((there[:, None] - self.there) ** 2 + (back[:, None] - self.back) ** 2).sum(1)
            best = objective.argmin(0, keepdim=True)  # the first of equals
            new = objective.gather(0, best)[0]
            better = new < self.objective
            chosen = held.clone()
            chosen[number] = weights[best[0]]
            self.weights = torch.where(better, chosen, self.weights)
            self.objective = torch.where(better, new, self.objective)
            self.kl_there = torch.where(better, there.gather(0, best)[0], self.kl_there)
            self.kl_back = torch.where(better, back.gather(0, best)[0], self.kl_back)

    def outcome(self) -> Fused:
        return Fused(
            normalised(self._mixed(self.weights)),
            self.weights.T.contiguous(),
            self.objective,
            self.kl_there,
            self.kl_back,
            self.there.T.contiguous(),
            self.back.T.contiguous(),
        )


def _ruled_out(said: dict[str, Tensor]) -> Tensor:
    """(N, vocabulary) bool: tokens that no term allows; `InputError` for anything else that is not finite."""
    lead, *_ = said.values()
    out = lead == -math.inf
    for name, one in said.items():
        if bool(one.isnan().any()) or not torch.equal(one == -math.inf, out):
            raise InputError(
                "its logits are not finite, other than -inf for tokens that all models rule out",
                where=name,
                fix="mask tokens after mixing, or in every model",
            )
    return out
