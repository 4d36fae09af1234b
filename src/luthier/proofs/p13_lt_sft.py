"""13, LT-SFT: sparse differences of two jobs, learnt apart, add up better than dense ones, and more of the base stays.

Facts world, 3 seeds: a model that knows 840 facts. Job A is the eighth relation of subjects 0 to 59, job B that of
subjects 60 to 119, each learnt from the base by itself; then base + A + B. Only the seven projections of each block may
move. Arms: dense differences (150 steps), LT-SFT (150 steps full, 150 sparse, a density of 0.08), random entries of the
same number (150 steps), and the values of the dense run on the chosen entries with no second part (a graft). The dense
run is LT-SFT's own full part: same rows, rate and start.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from luthier.merge.run import merge
from luthier.proofs.base import Claim, Measurements, Proof, count
from luthier.proofs.facts_bench import teach
from luthier.tune.selector.rewound import RewoundTuned
from luthier.weights.selection import Selection
from luthier.worlds.facts import Facts

OLD, NEW = range(7), range(7, 8)
JOBS = {"a": range(60), "b": range(60, 120)}
STEPS, RATE = 150, 2e-3
STILL = {"freeze": ("layer_norm", "embeddings")}  # the head rests too, as it is a language model's
ARMS: dict[str, tuple[dict[str, Any], int]] = {
    "dense": (
        {
            "method": "hft",
            "density": 1.0,
            "train_embeddings": False,
            "train_lm_head": False,
            "train_norms": "none",
        },
        STEPS,
    ),
    "lt_sft": ({"method": "lt_sft", "density": 0.08, **STILL}, 2 * STEPS),
    "random": ({"method": "lt_sft", "density": 0.08, "select": "random", **STILL}, STEPS),
}
SUM = {"method": "task-arithmetic", "scale": 1.0}
State = dict[str, torch.Tensor]


def prove(seed: int) -> Measurements:
    world = Facts(seed)
    base = world.pretrained(OLD)
    start = _state(base)
    made: dict[str, dict[str, State]] = {arm: {} for arm in (*ARMS, "graft")}
    found: Measurements = {}
    for job, subjects in JOBS.items():
        for arm, (tuning, steps) in ARMS.items():
            model, loop = teach(base, world, NEW, tuning, learning_rate=RATE, steps=steps, seed=seed, subjects=subjects)
            made[arm][job] = {name: tensor for name, tensor in _state(model).items() if name in start}
            if isinstance(loop.tuned, RewoundTuned):
                chosen, budget = loop.tuned.selection(), loop.tuned.entries
                if arm == "lt_sft":
                    made["graft"][job] = _graft(start, made["dense"][job], chosen)
                    changed = sum(int((made[arm][job][n] != tensor).sum()) for n, tensor in start.items())
                    found[f"entries_over_budget/{job}"] = changed - budget
                    outside = ((made[arm][job][n] != start[n]) & ~chosen.mask(n) for n in chosen)
                    found[f"entries_outside/{job}"] = sum(int(mask.sum()) for mask in outside)
    for arm, jobs in made.items():
        for job, subjects in JOBS.items():
            found[f"alone_{job}/{arm}"] = world.recall(_with(base, jobs[job]), NEW, subjects)[0]
        both = _sum(start, jobs["a"], jobs["b"])
        model = _with(base, both)
        for job, subjects in JOBS.items():
            found[f"composed_{job}/{arm}"] = world.recall(model, NEW, subjects)[0]
        found[f"old/{arm}"] = world.recall(model, OLD)[0]
        if arm == "lt_sft":
            other = _sum(start, jobs["b"], jobs["a"])
            found["order"] = max(float((both[name] - other[name]).abs().max()) for name in both)
    return found


def _state(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _with(base: nn.Module, state: State) -> nn.Module:
    model = copy.deepcopy(base)
    model.load_state_dict(state)
    return model


def _sum(start: State, *models: State) -> State:
    return merge(SUM, base=start, models=models).tensors


def _graft(start: State, dense: State, chosen: Selection) -> State:
    """The dense values at the chosen entries, the base's at all others."""
    return {n: torch.where(chosen.mask(n), dense[n], tensor) if n in chosen else tensor for n, tensor in start.items()}


def _composed(run: Measurements, arm: str) -> float:
    return (run[f"composed_a/{arm}"] + run[f"composed_b/{arm}"]) / 2


PROOF = Proof(
    paper=13,
    prove=prove,
    parts=[
        "luthier.tune.lt_sft",
        "luthier.tune.selector.parts",
        "luthier.tune.selector.rewound",
        "luthier.tune.selector.entries",
        "luthier.tune.selector.compact",
        "luthier.tune.selector.places",
        "luthier.merge.task_arithmetic",
        "luthier.worlds.facts",
        "luthier.proofs.facts_bench",
    ],
    claims=[
        Claim(
            "seeds in which the sum knows more of both jobs, on the mean, with LT-SFT: by 0.1 than with dense "
            "differences, and by 0.2 than with random entries",
            lambda runs: count(
                runs,
                lambda r: (
                    _composed(r, "lt_sft") - _composed(r, "dense") >= 0.1
                    and _composed(r, "lt_sft") - _composed(r, "random") >= 0.2
                ),
            ),
            "== 3",
            "paper",
        ),
        Claim(
            "seeds in which LT-SFT keeps at least 0.3 more of the old facts than dense differences",
            lambda runs: count(runs, lambda r: r["old/lt_sft"] - r["old/dense"] >= 0.3),
            "== 3",
            "paper",
        ),
        Claim(
            "new facts of a job alone: the worst of dense, LT-SFT and random",
            lambda runs: min(r[f"alone_{job}/{arm}"] for r in runs for arm in ARMS for job in JOBS),
            ">= 0.95",
            "ours",
        ),
        Claim(
            "new facts of a job alone without the second part: the best",
            lambda runs: max(r[f"alone_{job}/graft"] for r in runs for job in JOBS),
            "<= 0.5",
            "ours",
        ),
        Claim(
            "entries that differ from the base beyond the budget, or outside of what was chosen",
            lambda runs: max(
                max(r[f"entries_over_budget/{job}"], r[f"entries_outside/{job}"]) for r in runs for job in JOBS
            ),
            "<= 0",
            "exact",
        ),
        Claim(
            "largest difference between A + B and B + A",
            lambda runs: max(r["order"] for r in runs),
            "== 0",
            "exact",
        ),
    ],
)
