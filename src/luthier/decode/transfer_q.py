"""Transfer Q*: steer each next token by the reward of the texts that an aligned model makes of it.

    score(z)  =  log base(z | text)  +  weight TQ(text, z)            z among the base's top_k, no other token
    TQ(text, z)  =  E over completions by `tuned` of r(text + z + completion)

A reward knows finished texts only. So every candidate is written to its end (or `rollout_tokens` further) by a model
that already aims at the reward, such as a DPO model, and the text is graded then. Nothing is trained; only z stays.
`completion` picks the relatives: `none` grades the unfinished text (ARGS), `base` lets the untuned model finish it
(controlled decoding, CD; so does leaving `tuned` out). Optimal is pi* ~ base exp(Q* / alpha), weight = 1 / alpha.

`reward_tuned` = r' (indirect transfer): `tuned` was made for another reward, and completions are weighted by
w = exp(inv_beta (r - r')). The published form is the mean of w r, which leaves the normaliser of w out: a candidate
whose completions have r > r' gains even at equal r. `self_normalize` is sum w r / sum w over the rollouts of the
candidate; with exact expectations and inv_beta = 1 / beta it is direct transfer under the right model. It is ours.

Greedy completions are one per candidate; `rollout_sample` draws `rollouts` of them at temperature 1. They end at end
tokens, not at stop strings. The best value counts as 0 in the sum, which changes no probability: candidates of equal
value keep the base's order at any weight, and a huge weight is safe.

The reward reads the prompt and the answer as one text without special tokens. `special_tokens` leaves them in, for a
reward model of the same chat template; for one of another template give a function that builds its own.

`value` replaces all of it: any function (contexts, candidates) -> (rows, k) steers (value-guided decoding).

When not to use it: where cost counts, for a token costs top_k x rollouts completions; where sampling n answers and
keeping the best will do (`luthier.decode.best_of_n`), which asks the reward once per answer. A reward of a scale of 10
wants a weight to match, or standardising.

Chakraborty et al., NeurIPS 2024 (arXiv 2405.20495). The public code takes logits and completions from one aligned
model: here that is base=tuned. Of it we leave out special tokens in the reward's text and cap the weights' exponent at
20. Proof: luthier prove 50.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from luthier.data.read import import_callable
from luthier.decode.base import Decoder, Model, Step, Term
from luthier.decode.rewards import Given, reward_function, rewards_of, texts_of
from luthier.decode.rollouts import rollouts
from luthier.decode.sampling import generator_of
from luthier.errors import InputError

CAP = 20.0  # of the exponent of an unnormalised weight, as exp of a large reward leaves the numbers


class TransferQ(Decoder):
    """Transfer Q*, with ARGS and controlled decoding in the same loop.

    Attributes:
        base: the model that is steered.
        tuned: the aligned model that finishes the texts; `base` itself if not given.
        reward: of texts: a function list[str] -> one number each, `module:function`, a sequence classifier of one label
            (a folder, or in Python a module with its tokenizer).
        reward_tuned: the reward that `tuned` was made for, if that is another.
        value: in place of a reward: a function, or `module:function`, of the contexts (token ids of each row) and the
            candidates (rows, k) -> (rows, k).
        top_k: candidates; of equally probable tokens the lower number comes first.
        weight: of the value, in nats per unit of reward; 0 asks for no value.
        completion: who finishes a text.
        rollouts: completions of each candidate.
        rollout_tokens: their length at most; 0 is `completion: none`.
        rollout_sample: draw completions at temperature 1; otherwise the most probable tokens.
        inv_beta: of the weights of completions, 1 / (coefficient of the KL that `tuned` was made with).
        self_normalize: let the weights of a candidate's completions add up to 1.
        special_tokens: leave special tokens in the texts that are graded.
        seed: of the completions' draws.
    """

    method: Literal["transfer-q"] = "transfer-q"
    paper: ClassVar[int | None] = 50
    stepwise: ClassVar[bool] = True
    base: Model
    tuned: Model = None
    reward: Given = None
    reward_tuned: Given = None
    value: Given = None
    top_k: int = Field(default=10, ge=1)
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    completion: Literal["none", "base", "tuned"] = "tuned"
    rollouts: int = Field(default=1, ge=1)
    rollout_tokens: int = Field(default=20, ge=0)
    rollout_sample: bool = False
    inv_beta: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    self_normalize: bool = False
    special_tokens: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> TransferQ:
        if (self.reward is None) == (self.value is None):
            raise ValueError("it is steered by a reward or by a value: give one of the two")
        if self.value is not None and self.reward_tuned is not None:
            raise ValueError("reward_tuned goes with a reward, not with a value")
        if self.rollouts > 1 and not self.rollout_sample:
            raise ValueError("without rollout_sample all rollouts are the same: set it, or rollouts: 1")
        if self.self_normalize and (self.reward_tuned is None or self.rollouts < 2):
            raise ValueError("self_normalize compares rollouts under two rewards: give reward_tuned and rollouts >= 2")
        return self

    @cached_property
    def functions(self) -> dict[str, Any]:
        """What was given as `reward`, `reward_tuned` and `value`, ready to be called; opened once."""
        given = {"reward": self.reward, "reward_tuned": self.reward_tuned}
        found: dict[str, Any] = {name: reward_function(one) for name, one in given.items() if one is not None}
        if self.value is not None:
            found["value"] = import_callable(self.value) if isinstance(self.value, str) else self.value
        return found

    @property
    def writer(self) -> str | None:
        """The term that finishes texts; None if none does."""
        if self.value is not None or self.completion == "none" or self.rollout_tokens == 0:
            return None
        return "base" if self.tuned is None else self.completion

    def terms(self) -> dict[str, Term]:
        return {"base": Term(self.base)} | ({"tuned": Term(self.tuned, on="base")} if self.writer == "tuned" else {})

    def check(self, sizes: Mapping[str, int]) -> None:
        if self.top_k > min(sizes.values()):
            raise InputError(f"top_k is {self.top_k}, but there are {min(sizes.values())} tokens", where="transfer-q")
        _ = self.functions  # a reward that cannot be opened is refused before anything runs

    def scores(self, step: Step) -> Tensor:
        said = step.logprobs("base")
        candidates = most_probable(said, self.top_k)
        logits = said.gather(-1, candidates)
        step.trace |= {"candidates": candidates, "logits": logits}
        values = torch.zeros_like(logits, dtype=torch.float64)
        if self.weight and self.top_k > 1:  # else there is nothing to choose
            done = [not step.ends.isdisjoint(row) for row in _new(step)]
            live = [row for row, over in enumerate(done) if not over]
            if live:
                values[live] = self._values(step, candidates, live).to(values)
            step.trace |= {"value": values.float(), "score": (logits + self.weight * values).float()}
        return steered(said, candidates, values, self.weight)

    def _values(self, step: Step, candidates: Tensor, rows: Sequence[int]) -> Tensor:
        """(rows, k) float64: the value of each candidate of some rows of the batch."""
        new = _new(step)
        contexts = [[*step.prompts["base"][row], *new[row]] for row in rows]
        candidates = candidates[list(rows)]
        if "value" in self.functions:
            found = torch.as_tensor(self.functions["value"](contexts, candidates), dtype=torch.float64)
            if found.shape != candidates.shape or not bool(found.isfinite().all()):
                what = f"it must give finite numbers of shape {list(candidates.shape)}, got {list(found.shape)}"
                raise InputError(what, where="value")
            return found
        texts = self._texts(step, contexts, candidates, rows)
        shape = (*candidates.shape, -1)
        said = {name: rewards_of(reward, texts, name).view(shape) for name, reward in self.functions.items()}
        return expected(
            said["reward"], said.get("reward_tuned"), inv_beta=self.inv_beta, self_normalize=self.self_normalize
        )

    def _texts(self, step: Step, contexts: Sequence[list[int]], candidates: Tensor, rows: Sequence[int]) -> list[str]:
        """What the reward reads: rows x k x rollouts texts."""
        if step.tokenizer is None:
            raise InputError("a reward reads texts, and base has no tokenizer", fix="give one, or a value")
        each, fork, writer = self.rollouts, step.fork, self.writer
        first = candidates.repeat_interleave(each, dim=1).flatten().tolist()
        written: list[list[int]] = [[] for _ in first]
        if writer is not None:
            assert fork is not None
            said = step.logprobs("base")
            numbers = [int(step.rows[row]) for row in rows]
            at = step.generated.shape[1] if step.generated is not None else 0
            written = rollouts(
                lambda times: fork(writer, times),
                candidates,
                rows=rows,
                each=each,
                tokens=self.rollout_tokens,
                ends=step.ends,
                vocabulary=said.shape[1],
                generators=[draws(self.seed, number, at, said.device) for number in numbers]
                if self.rollout_sample
                else None,
            )
        width = candidates.shape[1] * each
        whole = [[*contexts[i // width], z, *ids] for i, (z, ids) in enumerate(zip(first, written, strict=True))]
        return texts_of(step.tokenizer, whole, special_tokens=self.special_tokens)


def _new(step: Step) -> list[list[int]]:
    """The tokens of every row so far."""
    return [[] for _ in step.rows] if step.generated is None else step.generated.tolist()


def draws(seed: int, number: int, at: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of the completions of one prompt's `at`-th token; apart from those that the sampler draws with."""
    return generator_of((seed * 1_000_003 + number) * 1_000_003 + at, 50 << 40, device)


def most_probable(logprobs: Tensor, count: int) -> Tensor:
    """(N, vocabulary) -> (N, count) int64 tokens, the most probable first; of equals the lower number."""
    return logprobs.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def expected(
    rewards: Tensor,
    rewards_tuned: Tensor | None = None,
    *,
    inv_beta: float = 0.5,
    self_normalize: bool = False,
    shares: Tensor | None = None,
) -> Tensor:
    """TQ from the rewards of completions.

    Args:
        rewards: (..., J) of each completion.
        rewards_tuned: the same under the reward of the model that wrote them; None is direct transfer, the plain mean.
        inv_beta: of the weights exp(inv_beta (rewards - rewards_tuned)).
        self_normalize: divide by the sum of the weights; without it their exponent is cut at 20.
        shares: (..., J) probabilities of the completions, for exact expectations; equal if not given.

    Returns (...,) of the dtype of `rewards`.
    """
    if shares is None:
        shares = torch.full_like(rewards, 1 / rewards.shape[-1])
    if rewards_tuned is None:
        return (shares * rewards).sum(dim=-1)
    exponent = inv_beta * (rewards - rewards_tuned)
    if self_normalize:
        return ((exponent + shares.log()).softmax(dim=-1) * rewards).sum(dim=-1)
    return (shares * exponent.clamp(max=CAP).exp() * rewards).sum(dim=-1)


def steered(logprobs: Tensor, candidates: Tensor, values: Tensor, weight: float) -> Tensor:
    """Log-probabilities in proportion to exp(logprobs + weight values) over the candidates, -inf elsewhere.

    Args:
        logprobs: (N, vocabulary), nats.
        candidates: (N, k) tokens.
        values: (N, k), finite.

    Returns (N, vocabulary) of the dtype of `logprobs`. Reckoned in float64, from the best value that can come: a
    constant on a row's values changes nothing.
    """
    own, values = logprobs.gather(-1, candidates).double(), values.double()
    best = values.masked_fill(own == -math.inf, -math.inf).amax(dim=-1, keepdim=True)
    score = (own + weight * (values - best).clamp(max=0)).log_softmax(dim=-1)
    return torch.full_like(logprobs, -math.inf).scatter(-1, candidates, score.to(logprobs.dtype))
