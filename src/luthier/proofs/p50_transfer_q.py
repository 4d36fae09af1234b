"""50, Transfer Q*: finishing each candidate with an aligned model steers further towards a reward than its relatives.

A world small enough to count out: 4 tokens, texts of 6, so 4,096 texts. The SFT policy is a softmax of standard normal
logits at every prefix; the reward of a text is a standard normal number of its own. Aligned models are exact:
SFT x exp(reward / beta) over whole texts, beta 0.5. All expectations are sums over all texts, in float64; every token
is a candidate; the weight is 1 / beta. Each seed is a world.

    args        the reward of an unfinished text, a number that says nothing of its continuations
    cd          completions by the SFT policy
    direct      completions by the model that is aligned to the reward
    unweighted  completions by a model that is aligned to another reward: half of this one and noise
    code        the same, weighted as published, inv_beta 0.5
    normalised  the same, weights normalised for each candidate, inv_beta 1 / beta
    optimum     the aligned model itself, sampled; the best text of all, greedily

Beside this, CD and direct transfer where both may move equally far from SFT (a KL of 1 nat over whole texts).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from luthier.decode.transfer_q import expected, most_probable, steered
from luthier.proofs.base import Claim, Measurements, Proof, count, mean

TOKENS, LENGTH, BETA = 4, 6, 0.5
ARMS = ("sft", "args", "cd", "direct", "unweighted", "code", "normalised")
Steps = list[Tensor]  # for each position t: (TOKENS^t prefixes, TOKENS) numbers of the next token


class World:
    """The SFT policy and two rewards."""

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        self.sft: Steps = [self.normal(TOKENS**at, TOKENS).log_softmax(-1) for at in range(LENGTH)]
        self.reward = self.normal(TOKENS**LENGTH)
        self.other = 0.5 * self.reward + self.normal(TOKENS**LENGTH)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def aligned(self, reward: Tensor) -> Tensor:
        """(texts,) log-probabilities of SFT x exp(reward / beta)."""
        return (texts(self.sft) + reward / BETA).log_softmax(0)

    def values(self, writer: Tensor, **how: float | Tensor | None) -> Steps:
        """The value of every candidate at every prefix, where `writer` (texts,) finishes the texts."""
        found = []
        for at in range(LENGTH):
            shape = (TOKENS**at, TOKENS, TOKENS ** (LENGTH - at - 1))
            other = how.get("rewards_tuned")
            found.append(
                expected(
                    self.reward.view(shape),
                    other.view(shape) if isinstance(other, Tensor) else None,
                    inv_beta=float(how.get("inv_beta", 0.5)),  # type: ignore[arg-type]
                    self_normalize=bool(how.get("self_normalize")),
                    shares=writer.view(shape).softmax(-1),
                )
            )
        return found

    def unfinished(self) -> Steps:
        """The value of ARGS: numbers of their own for unfinished texts, the reward for finished ones."""
        return [self.normal(TOKENS**at, TOKENS) for at in range(LENGTH - 1)] + [self.reward.view(-1, TOKENS)]

    def steered(self, values: Steps, weight: float) -> Steps:
        """The policy that the decoder makes of SFT."""
        found = []
        for said, value in zip(self.sft, values, strict=True):
            candidates = most_probable(said, TOKENS)
            found.append(steered(said, candidates, value.gather(-1, candidates), weight))
        return found

    def kl(self, policy: Tensor) -> float:
        """KL(policy || SFT) in nats, over whole texts."""
        return float((policy.exp() * (policy - texts(self.sft))).sum())

    def mean_reward(self, policy: Tensor) -> float:
        return float((policy.exp() * self.reward).sum())

    def at_kl(self, values: Steps, nats: float) -> Tensor:
        """(texts,) the steered policy whose weight moves it `nats` away, by bisection."""
        low, high = 0.0, 64.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.kl(texts(self.steered(values, middle))) < nats else (low, middle)
        return texts(self.steered(values, (low + high) / 2))


def texts(policy: Steps) -> Tensor:
    """(TOKENS^LENGTH,) log-probabilities of whole texts; the first token is the slowest digit of a text's number."""
    found = torch.zeros(1, dtype=torch.float64)
    for said in policy:
        found = (found[:, None] + said).flatten()
    return found


def greedy(policy: Steps) -> int:
    """The number of the text of most probable tokens."""
    number = 0
    for said in policy:
        number = number * TOKENS + int(said[number].argmax())
    return number


def prove(seed: int) -> Measurements:
    world = World(seed)
    right, astray = world.aligned(world.reward), world.aligned(world.other)
    values = {
        "args": world.unfinished(),
        "cd": world.values(texts(world.sft)),
        "direct": world.values(right),
        "unweighted": world.values(astray),
        "code": world.values(astray, rewards_tuned=world.other, inv_beta=0.5),
        "normalised": world.values(astray, rewards_tuned=world.other, inv_beta=1 / BETA, self_normalize=True),
    }
    policies = {"sft": world.sft} | {name: world.steered(value, 1 / BETA) for name, value in values.items()}
    found: Measurements = {}
    for name, policy in policies.items():
        whole = texts(policy)
        found[f"sampled/{name}"] = world.mean_reward(whole)
        found[f"greedy/{name}"] = float(world.reward[greedy(policy)])
        found[f"kl/{name}"] = world.kl(whole)
    found |= {
        "sampled/optimum": world.mean_reward(right),
        "greedy/optimum": float(world.reward.max()),
        "kl/optimum": world.kl(right),
    }
    for name in ("cd", "direct"):
        found[f"at_1_nat/{name}"] = world.mean_reward(world.at_kl(values[name], 1.0))
    pairs = zip(values["normalised"], values["direct"], strict=True)
    found["normalised_is_direct"] = max(float((a - b).abs().max()) for a, b in pairs)
    return found


def smallest_step(how: str) -> Callable[[Sequence[Measurements]], float]:
    """The smallest gain along SFT, ARGS, CD, direct, of means over the worlds."""
    order = ("sft", "args", "cd", "direct")

    def measure(runs: Sequence[Measurements]) -> float:
        means = [mean(runs, f"{how}/{name}") for name in order]
        return min(after - before for before, after in itertools.pairwise(means))

    return measure


def worlds(how: str, better: str, worse: str) -> Callable[[Sequence[Measurements]], float]:
    return lambda runs: count(runs, lambda r: r[f"{how}/{better}"] > r[f"{how}/{worse}"])


def gain(how: str, better: str, worse: str) -> Callable[[Sequence[Measurements]], float]:
    return lambda runs: mean(runs, f"{how}/{better}") - mean(runs, f"{how}/{worse}")


def objective(run: Measurements, name: str) -> float:
    """What an aligned model is the best of: the mean reward less beta KL."""
    return run[f"sampled/{name}"] - BETA * run[f"kl/{name}"]


Source = Literal["paper", "exact", "ours"]


def claim(name: str, measure: Callable[[Sequence[Measurements]], float], bound: str, source: Source) -> Claim:
    return Claim(name, measure, bound, source)


PROOF = Proof(
    paper=50,
    prove=prove,
    parts=["luthier.decode.transfer_q"],
    seeds=tuple(range(20)),
    claims=[
        claim("sampled: smallest gain along SFT, ARGS, CD, direct, of means", smallest_step("sampled"), "> 0", "paper"),
        claim("greedy: smallest gain along SFT, ARGS, CD, direct, of means", smallest_step("greedy"), "> 0", "paper"),
        claim("sampled: worlds in which direct is above CD", worlds("sampled", "direct", "cd"), ">= 18", "paper"),
        claim("greedy: worlds in which direct is above CD", worlds("greedy", "direct", "cd"), ">= 15", "paper"),
        claim(
            "sampled: worlds in which normalised weights are above no weights",
            worlds("sampled", "normalised", "unweighted"),
            ">= 16",
            "ours",
        ),
        claim(
            "largest distance of the value with normalised weights from direct transfer's",
            lambda runs: max(r["normalised_is_direct"] for r in runs),
            "<= 1e-9",
            "exact",
        ),
        claim(
            "smallest lead of the optimum in mean reward less beta KL, over all arms and worlds",
            lambda runs: min(objective(r, "optimum") - objective(r, name) for r in runs for name in ARMS),
            ">= 0",
            "exact",
        ),
        Claim(
            "sampled, weights chosen for a KL of 1 nat from SFT: direct less CD, mean",
            gain("at_1_nat", "direct", "cd"),
            "> 0",
            "ours",
            expected=False,
        ),
        Claim(
            "greedy: the published weights less no weights, mean",
            gain("greedy", "code", "unweighted"),
            "> 0",
            "paper",
            expected=False,
        ),
    ],
    notes=[
        "Completions are counted out, not sampled: rollouts of models are held to the definition by the tests.",
        "The reward of an unfinished text says nothing here, which is the worst case for ARGS.",
        "Direct transfer moves further per unit of weight than CD; at an equal KL the two are level.",
        "Greedily, the mean of the published weights less no weights is about one standard error from 0.",
    ],
)
