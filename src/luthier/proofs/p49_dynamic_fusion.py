"""49, dynamic logits fusion: two small experts steer a large base, and at every token the search picks one of them.

Entities world, half of its texts sums, 3 seeds. One small expert is tuned to answer facts in one format, one to answer
sums in another; the large base knows both skills and neither format. (Its head is not tied to its embedding, other than
the world's own: tied, it does not learn to add.) On unseen questions of both, half of each
(`mixed`): the base, each expert alone at weight 1, both at weight 1, and the search, also `joint` and with the one
matching expert. Right is format and value. `matching` is the share of answer tokens on which the weight of the
matching expert is above 0 (one expert at most acts; a token without any counts as not matching); `acting` is that share
among the tokens on which one acts.

Exact, on random logits of 50 tokens: what the objective's definition says of special cases, and a plain search in
float64.
"""

from __future__ import annotations

from statistics import fmean

import numpy as np
import torch
from scipy.special import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.decode import DynamicFusion, Eft
from luthier.decode.fusion import fuse
from luthier.proofs.base import Claim, Measurements, Proof, count, mean
from luthier.proofs.entities_bench import Bench
from luthier.worlds.entities import BOS, END, VOCABULARY, Entities, Skill

SKILLS: tuple[Skill, Skill] = ("fact", "sum")
STATIC = ("fact_expert", "sum_expert", "both_experts")
TEXTS, STEPS = 96_000, 1500  # of the large base
ROWS, TOKENS = 64, 50
GRID = [round(0.1 * i, 12) for i in range(21)]


def prove(seed: int) -> Measurements:
    bench = Bench(Entities(seed, sums=0.5))
    world = bench.world
    big, small = _large(world), world.pretrained("small")
    experts = {skill: world.tuned(small, world.lesson(skill), learning_rate=1e-3) for skill in SKILLS}
    both = tuple(experts.values())
    arms = {f"{skill}_expert": Eft(base=big, tuned=experts[skill], tuned_base=small) for skill in SKILLS}
    arms["both_experts"] = Eft(base=big, tuned=both, tuned_base=small)
    dynamic = DynamicFusion(base=big, tuned=both, tuned_base=small)
    found: Measurements = {}
    for number, skill in enumerate(SKILLS):
        said = {arm: [g.ids for g in bench.mixture(decoder, skill)] for arm, decoder in arms.items()}
        said["base"] = bench.model(big, skill, tuned=False)
        said["small_expert"] = bench.model(experts[skill], skill, tuned=True)
        searched = bench.mixture(dynamic, skill, trace=True)
        said["dynamic"] = [g.ids for g in searched]
        said["dynamic_joint"] = [g.ids for g in bench.mixture(dynamic.model_copy(update={"joint": True}), skill)]
        alone = DynamicFusion(base=big, tuned=experts[skill], tuned_base=small)
        said["dynamic_matching"] = [g.ids for g in bench.mixture(alone, skill)]
        for arm, answers in said.items():
            scores = bench.scores(skill, answers, arm)
            found |= {f"{skill}/{arm}": scores[f"both/{arm}"], f"{skill}_known/{arm}": scores[f"fact/{arm}"]}
        weights = [token for g in searched for token in g.logprobs["trace.weights"]]
        found[f"tokens/{skill}"] = float(len(weights))
        found[f"matching_tokens/{skill}"] = float(sum(w[number] > 0 for w in weights))
        found[f"acting_tokens/{skill}"] = float(sum(max(w) > 0 for w in weights))
    for arm in ("base", *STATIC, "dynamic", "dynamic_joint"):
        found[f"mixed/{arm}"] = fmean(found[f"{skill}/{arm}"] for skill in SKILLS)
    found["matching"] = fmean(found[f"matching_tokens/{s}"] / max(1.0, found[f"tokens/{s}"]) for s in SKILLS)
    found["acting"] = fmean(found[f"matching_tokens/{s}"] / max(1.0, found[f"acting_tokens/{s}"]) for s in SKILLS)
    return found | _exact(seed)


def _large(world: Entities) -> LlamaForCausalLM:
    """A base of 3 blocks and width 96 that has read texts, as a lesson whose answers are whole texts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=16,
                initializer_range=0.05,
                tie_word_embeddings=False,
                bos_token_id=BOS,
                eos_token_id=END,
                pad_token_id=END,
            )
        )
    ids, labels = world.texts(TEXTS, np.random.default_rng([world.seed, 4]))
    texts = [text[:length] for text, length in zip(ids.tolist(), (labels >= 0).sum(1).tolist(), strict=True)]
    return world.tuned(model, [([], text) for text in texts], learning_rate=1e-3, steps=STEPS)


def _exact(seed: int) -> Measurements:
    rng = np.random.default_rng(seed)
    large, small = 2 * rng.normal(size=(2, ROWS, TOKENS))
    experts = small + 1.5 * rng.normal(size=(2, ROWS, TOKENS))
    as_said = [torch.log_softmax(torch.tensor(z).float(), -1) for z in (large, small, *experts)]
    p, q, one, two = as_said
    same = fuse(q, q, [one], [GRID])
    still = fuse(p, q, [q, q], [GRID, GRID])
    twins = fuse(p, q, [one, one], [GRID, GRID])
    found = fuse(p, q, [one, two], [GRID, GRID])
    ends = [fuse(p, q, [one, two], [[a], [b]]).objective for a, b in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))]
    other = 0
    for row in range(ROWS):
        values = {(t, a): _objective(large[row], small[row], experts[:, row], t, a) for t in (0, 1) for a in GRID}
        (expert, weight), *_ = ranked = sorted(values, key=values.__getitem__)
        clear = values[ranked[1]] - values[ranked[0]] > 1e-5
        wanted = [0.0, 0.0]
        wanted[expert] = weight
        other += clear and not np.allclose(found.weights[row].numpy(), wanted, atol=1e-6)
    return {
        "exact/weight_where_large_is_small": float((same.weights - 1).abs().max()),
        "exact/mixture_where_large_is_small": float((same.logprobs - one).abs().max()),
        "exact/weight_of_experts_that_did_not_move": float(still.weights.abs().max()),
        "exact/weight_of_the_second_twin": float(twins.weights[:, 1].abs().max()),
        "exact/objective_above_its_ends": max(float((found.objective - end).max()) for end in ends),
        "exact/rows_other_than_a_plain_search": float(other),
    }


def _objective(large: np.ndarray, small: np.ndarray, experts: np.ndarray, number: int, weight: float) -> float:
    """Of one row with one expert acting, float64."""
    p, q = log_softmax(large), log_softmax(small)
    mixed = log_softmax(large + weight * (experts[number] - small))
    there, back = _kl(mixed, p), _kl(p, mixed)
    targets = [log_softmax(expert) for expert in experts]
    return sum((there - _kl(e, q)) ** 2 + (back - _kl(q, e)) ** 2 for e in targets)


def _kl(a: np.ndarray, b: np.ndarray) -> float:
    return float((np.exp(a) * (a - b)).sum())


PROOF = Proof(
    paper=49,
    prove=prove,
    parts=[
        "luthier.decode.fusion",
        "luthier.decode.eft",
        "luthier.decode.base",
        "luthier.decode.mixture",
        "luthier.decode.streams",
        "luthier.worlds.entities",
        "luthier.proofs.entities_bench",
    ],
    claims=[
        Claim(
            "the large base knows facts and sums in its own format, smallest of the seeds and skills",
            lambda runs: min(r[f"{s}_known/base"] for r in runs for s in SKILLS),
            ">= 0.9",
            "ours",
        ),
        Claim(
            "mixed set: dynamic less the better of the two single experts at weight 1, smallest of the seeds",
            lambda runs: min(r["mixed/dynamic"] - max(r["mixed/fact_expert"], r["mixed/sum_expert"]) for r in runs),
            ">= 0.1",
            "paper",
        ),
        Claim(
            "mixed set: dynamic less both experts at weight 1, mean",
            lambda runs: mean(runs, "mixed/dynamic") - mean(runs, "mixed/both_experts"),
            "> 0",
            "ours",
        ),
        Claim(
            "answer tokens on which the matching expert acts, share, mean",
            lambda runs: mean(runs, "matching"),
            "> 0.7",
            "ours",
        ),
        Claim(
            "seeds in which dynamic with the matching expert alone is above both models' own answers, on both skills",
            lambda runs: count(
                runs,
                lambda r: all(r[f"{s}/dynamic_matching"] > max(r[f"{s}/base"], r[f"{s}/small_expert"]) for s in SKILLS),
            ),
            "== 3",
            "paper",
        ),
        Claim(
            "matching expert alone: dynamic less weight 1, mean of both skills",
            lambda runs: fmean(mean(runs, f"{s}/dynamic_matching") - mean(runs, f"{s}/{s}_expert") for s in SKILLS),
            "> 0",
            "paper",
        ),
        Claim(
            "large = small: largest distance of the weight from 1",
            lambda runs: max(r["exact/weight_where_large_is_small"] for r in runs),
            "== 0",
            "exact",
        ),
        Claim(
            "large = small: largest difference of log-probabilities from the expert's",
            lambda runs: max(r["exact/mixture_where_large_is_small"] for r in runs),
            "<= 1e-4",
            "exact",
        ),
        Claim(
            "experts that did not move: largest weight",
            lambda runs: max(r["exact/weight_of_experts_that_did_not_move"] for r in runs),
            "== 0",
            "exact",
        ),
        Claim(
            "two equal experts: largest weight of the second",
            lambda runs: max(r["exact/weight_of_the_second_twin"] for r in runs),
            "== 0",
            "exact",
        ),
        Claim(
            "objective found above that at weight 0 or 1, largest",
            lambda runs: max(r["exact/objective_above_its_ends"] for r in runs),
            "<= 1e-6",
            "exact",
        ),
        Claim(
            "rows in which a plain search in float64 finds other weights",
            lambda runs: max(r["exact/rows_other_than_a_plain_search"] for r in runs),
            "== 0",
            "exact",
        ),
    ],
    notes=[
        "In a first run the large base, with tied weights, did not learn to add; it was replaced, the bounds stayed.",
        "What does not hold was expected to hold; bounds are those of before the first run.",
        "Which expert acts follows how far experts move; asked about the other skill, they move as far.",
    ],
)
