"""65, DPO and its variants: on the same pairs, the losses that measure against a reference gain far more than imitating
the chosen answers, and a hundred pairs give nearly what a thousand give.

Three experiments per seed. Exact: laws that follow from the losses' definitions, on random vectors in float64. Bandit
(`luthier.worlds.bandit`): 20, 100 and 1000 pairs, 300 Adam steps at rate 0.02 on all of them at once; figures are the
gain in expected reward on held-out prompts. All betas are 0.1 but SimPO's, whose default is 2; robust assumes a tenth
of wrong labels. Language model (`luthier.worlds.arrangements`): each loss through the real loop with full tuning, 60
steps of 32 pairs at rate 3e-4 falling to 0, from the pre-trained start and from the same start after 100 steps of
supervised tuning on demonstrations; figures are the expected reward and the probability of a valid answer.

The paper's finding that KTO and CPO do without the supervised stage is about dialogue at 7 billion parameters. It is
measured here all the same and not expected to show.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier.methods import build
from luthier.models.topology import Topology
from luthier.objectives.cpo import cpo
from luthier.objectives.dpo import dpo
from luthier.objectives.hinge import hinge
from luthier.objectives.ipo import ipo
from luthier.objectives.kto import kto
from luthier.objectives.preference import Pairs, Preference, WithLikelihood
from luthier.objectives.robust import robust
from luthier.objectives.simpo import simpo
from luthier.proofs.base import Claim, Measurements, Proof, mean
from luthier.train import Loop, TrainSettings
from luthier.tune import Probe
from luthier.worlds.arrangements import AnswerRows, Arrangements
from luthier.worlds.bandit import FEATURES, Bandit, BanditPairs

METHODS: dict[str, dict[str, Any]] = {
    name: {"method": name} for name in ("dpo", "hinge", "ipo", "kto", "cpo", "simpo", "orpo")
} | {"robust": {"method": "robust", "label_smoothing": 0.1}}
SIZES, LM_SIZES = (20, 100, 1000), (100, 1000)
BETA = 0.1


def prove(seed: int) -> Measurements:
    return _laws(seed) | _bandit(seed) | _language_model(seed)


# Exact: how far each law is missed.


def _laws(seed: int) -> Measurements:
    generator = torch.Generator().manual_seed(seed)
    lp_w, lp_l, rp_w, rp_l, shift = -torch.rand(5, 64, generator=generator, dtype=torch.float64) * 20
    ones = torch.ones_like(lp_w)
    length = torch.full_like(lp_w, 7)
    zero = torch.zeros((), dtype=torch.float64)
    referenced: dict[str, Callable[..., Tensor]] = {
        "dpo": partial(dpo, beta=BETA, label_smoothing=0.0),
        "robust": partial(robust, beta=BETA, label_smoothing=0.1),
        "hinge": partial(hinge, beta=BETA),
        "ipo": partial(ipo, n_w=ones, n_l=ones, beta=BETA, length_normalised=True),
    }
    start = {"dpo": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": (1 / (2 * BETA)) ** 2}
    off = {f"start/{name}": _off(loss(rp_w, rp_l, rp_w, rp_l), start[name]) for name, loss in referenced.items()}
    judge = partial(kto, desirable=ones > 0, z0=zero, beta=BETA, desirable_weight=1.0, undesirable_weight=1.0)
    off["start/kto"] = _off(judge(rp_w, rp_w), 0.5)
    for name, loss in referenced.items():
        moved = loss(lp_w + shift, lp_l, rp_w + shift, rp_l)
        off[f"same_shift/{name}"] = _off(moved, loss(lp_w, lp_l, rp_w, rp_l))
    leaf = lp_w.clone().requires_grad_()
    referenced["dpo"](leaf, lp_l, rp_w, rp_l).sum().backward()
    d = BETA * ((lp_w - rp_w) - (lp_l - rp_l))
    assert leaf.grad is not None
    off["identity/gradient_of_dpo"] = _off(leaf.grad, -BETA * torch.sigmoid(-d))
    flat = referenced["dpo"](lp_w, lp_l, shift, shift)
    off["identity/cpo_is_dpo_without_a_reference"] = _off(cpo(lp_w, lp_l, beta=BETA, label_smoothing=0.0), flat)
    averaged = simpo(lp_w, lp_l, length, length, beta=2.0, gamma=0.0)
    off["identity/simpo_is_cpo_at_equal_lengths"] = _off(averaged, cpo(lp_w, lp_l, beta=2 / 7, label_smoothing=0.0))
    return off


def _off(value: Tensor, expected: Tensor | float) -> float:
    return float((value.detach() - expected).abs().max())


# The bandit: full batches, nothing but the losses.


def _bandit(seed: int) -> Measurements:
    world = Bandit(seed)
    losses = {"sft": lambda pairs, rows: -pairs.lp_w.mean()} | {name: _loss(method) for name, method in METHODS.items()}
    drawn = {n: world.pairs(n) for n in SIZES}
    return {f"bandit_{n}/{name}": _gain(world, drawn[n], loss) for n in SIZES for name, loss in losses.items()}


def _gain(world: Bandit, drawn: BanditPairs, loss: Callable[[Pairs, Any], Tensor]) -> float:
    prompts, answers = drawn.prompt.repeat(2), torch.cat([drawn.chosen, drawn.rejected])
    ones = torch.ones(len(drawn))
    weights = torch.zeros(FEATURES, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.02)
    for _ in range(300):
        policy = world.logprobs(weights)
        (lp_w, lp_l), (rp_w, rp_l) = (table[prompts, answers].chunk(2) for table in (policy, world.reference))
        optimizer.zero_grad()
        loss(Pairs(lp_w, lp_l, ones, ones, rp_w, rp_l), (policy - world.reference, prompts, answers)).backward()
        optimizer.step()
    return world.gain(weights)


def _loss(settings: dict[str, Any]) -> Callable[[Pairs, Any], Tensor]:
    """The mean loss over all pairs of an objective as a recipe builds it."""
    objective: Any = build("objectives", settings)
    if settings["method"] == "kto":
        return partial(_kto, objective)

    def mean_of_pairs(pairs: Pairs, rows: Any) -> Tensor:
        assert isinstance(objective, Preference)
        value = objective.compare(pairs).mean()
        if isinstance(objective, WithLikelihood):
            value = value - objective.likelihood_weight * pairs.lp_w.mean()
        return value

    return mean_of_pairs


def _kto(objective: Any, pairs: Pairs, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """KTO over all answers; row i is mismatched with the answer of row i - 1, all chosen ones coming first."""
    h, prompts, answers = rows
    z0 = h.detach()[prompts, answers.roll(1)].mean().clamp(min=0)
    lp, rp = torch.cat([pairs.lp_w, pairs.lp_l]), torch.cat([pairs.rp_w, pairs.rp_l])
    desirable = torch.arange(len(lp)) < len(pairs.lp_w)
    weights = {name: getattr(objective, name) for name in ("beta", "desirable_weight", "undesirable_weight")}
    return kto(lp, rp, desirable, z0, **weights).mean()


# The language model: the real loop, two starts.


def _language_model(seed: int) -> Measurements:
    world = Arrangements(seed)
    base = world.pretrained()
    sft = _tuned(base, world.demonstrations(1000), {"method": "sft"}, steps=100, learning_rate=1e-3, seed=seed)
    found: Measurements = {}
    for start, model in (("direct", base), ("after_sft", sft)):
        for size in LM_SIZES:
            arms = {"start": model}
            for name, method in METHODS.items():
                arms[name] = _tuned(model, world.pairs(size), method, steps=60, learning_rate=3e-4, seed=seed)
            for name, arm in arms.items():
                found[f"lm_{start}_{size}/{name}"], found[f"valid_{start}_{size}/{name}"] = world.judge(arm)
    return found


def _tuned(
    model: nn.Module, rows: AnswerRows, objective: dict[str, Any], *, steps: int, learning_rate: float, seed: int
) -> nn.Module:
    """A copy of `model` after `steps` AdamW steps of 32 pairs (or rows), full tuning."""
    copied = copy.deepcopy(model)
    tuned: Any = build("tune", {"method": "full"}).attach(copied, Probe(Topology.of(copied), seed))  # type: ignore[attr-defined]
    settings = TrainSettings(
        learning_rate=learning_rate,
        max_steps=steps,
        effective_batch_size=32,
        max_tokens_per_device=4096,
        lr_scheduler_type="linear",
        warmup_steps=0,
    )
    Loop(tuned, build("objectives", objective), settings, rows, seed=seed, device="cpu").run()  # type: ignore[arg-type]
    return tuned.model.eval()


def _largest(prefix: str) -> Callable[[Any], float]:
    return lambda runs: max(value for run in runs for name, value in run.items() if name.startswith(prefix))


def _over(figure: str, of: str) -> Callable[[Any], float]:
    return lambda runs: mean(runs, figure) / mean(runs, of)


PROOF = Proof(
    paper=65,
    prove=prove,
    parts=[
        *(f"luthier.objectives.{name}" for name in METHODS),
        "luthier.objectives.preference",
        "luthier.worlds.bandit",
        "luthier.worlds.arrangements",
    ],
    claims=[
        Claim("largest miss of a loss's value at the reference", _largest("start/"), "<= 1e-9", "exact"),
        Claim(
            "largest change of a loss by the same shift of an answer under policy and reference",
            _largest("same_shift/"),
            "<= 1e-9",
            "exact",
        ),
        Claim("largest miss of the identities between losses", _largest("identity/"), "<= 1e-9", "exact"),
        *(
            Claim(
                f"{name.upper()}'s gain over imitation's, {n} pairs",
                _over(f"bandit_{n}/{name}", f"bandit_{n}/sft"),
                ">= 2",
                "ours",
            )
            for n in (100, 1000)
            for name in ("dpo", "ipo", "kto")
        ),
        *(
            Claim(
                f"{name.upper()}'s gain with 100 pairs over that with 1000",
                _over(f"bandit_100/{name}", f"bandit_1000/{name}"),
                ">= 0.85",
                "paper",
            )
            for name in ("dpo", "kto")
        ),
        *(
            Claim(
                f"language model: {name.upper()}'s reward without the supervised stage over that with it, 1000 pairs",
                _over(f"lm_direct_1000/{name}", f"lm_after_sft_1000/{name}"),
                ">= 0.95",
                "paper",
                expected=False,
            )
            for name in ("kto", "cpo")
        ),
        *(
            Claim(
                f"language model: {name.upper()}'s reward with the supervised stage minus that without it, 1000 pairs",
                lambda runs, name=name: mean(runs, f"lm_after_sft_1000/{name}") - mean(runs, f"lm_direct_1000/{name}"),  # type: ignore[misc]
                "> 0",
                "paper",
                expected=False,
            )
            for name in ("dpo", "ipo")
        ),
    ],
    notes=(
        "Gains are expected rewards on held-out prompts beyond the reference's.",
        "CPO and ORPO gain about as little as imitation in the bandit: their likelihood outweighs the comparison.",
        "Three bandits are few for the share of 100 in 1000 pairs: with seeds 0 to 11 it is 0.867 (DPO), 0.858 (KTO).",
        "Language model: figures for comparison; the specification promises no margin for them.",
    ),
)
