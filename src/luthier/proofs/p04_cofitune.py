"""04, CoFiTune: the feed-forward of a quarter of the layers learns the new facts as full tuning does and forgets less;
holding back important units keeps still more.

Facts world with 8 blocks, 3 seeds. Versatility: 840 old facts and a copy task (subject, COPY -> subject), 960 rows that
the base knows. Speciality: 120 new facts, 150 steps at one rate for all (1e-3; full tuning also at 3e-4, where the
quarters have not learnt yet). Arms: full tuning; the feed-forward (up, down) of each quarter, without a mask, with the
soft mask, with the same mask of which the importance is dealt out at random within each layer and kind, and with steps
instead of gradients multiplied (`update`). `old_loss` and `old` are over the 960 rows, `sum` is speciality plus
versatility in shares.

Search: 60 steps a node over the four quarters, at most 10 runs. Steps, rate and the 600 steps of pre-training (instead
of 900: the base knows all by then) were set on another seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.proofs.base import Claim, Measurements, Proof, count
from luthier.proofs.facts_bench import teach
from luthier.tune.cofitune import CofiTuned
from luthier.tune.selector.coarse_search import coarse_search, paper_tree
from luthier.tune.selector.importance import Importance
from luthier.tune.selector.importance_score import save_importance
from luthier.worlds.facts import OBJECTS, RELATIONS, SUBJECTS, Facts

BLOCKS, STEPS, SEARCH_STEPS, RATE, LOW_RATE = 8, 150, 60, 1e-3, 3e-4
QUARTERS = ("bottom1", "bottom2", "middle", "top")
COPY = RELATIONS  # a ninth relation of every subject to itself
OLD, NEW = (*range(7), COPY), (7,)


class CopyingFacts(Facts):
    """The facts world with one more relation, `COPY`."""

    def triples(
        self, relations: Iterable[int], subjects: Sequence[int] = range(SUBJECTS)
    ) -> list[tuple[int, int, int]]:
        token = SUBJECTS + RELATIONS + OBJECTS
        copies = [(s, token, s) for s in subjects]
        return [row for r in relations for row in (copies if r == COPY else Facts.triples(self, [r], subjects))]


def prove(seed: int) -> Measurements:
    world = CopyingFacts(seed)
    base = world.pretrained(OLD, blocks=BLOCKS, steps=600)
    found: Measurements = {"old/base": world.recall(base, OLD)[0]}
    for arm, rate in {"full": RATE, "full_low_rate": LOW_RATE}.items():
        model, _ = teach(base, world, NEW, {"method": "full"}, learning_rate=rate, steps=STEPS, seed=seed)
        found |= _judged(world, model, arm)
    rested, trained = 1.0, 1.0
    for quarter in QUARTERS:
        coarse = {"method": "cofitune", "layers": quarter, "modules": ["up_proj", "down_proj"]}
        model, tuned = _taught(base, world, {**coarse, "soft_mask": []}, seed)
        found |= _judged(world, model, f"ff_{quarter}")
        rested = min(rested, float(_rest(base, tuned)))
        trained = min(trained, float(len(tuned.moving()) == 2 * BLOCKS // 4))
        model, tuned = _taught(base, world, coarse, seed)
        found |= _judged(world, model, f"soft_{quarter}")
        rested = min(rested, float(_rest(base, tuned)))
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "importance.safetensors"
            save_importance(_dealt_out(tuned.importance, seed), BLOCKS, path)
            model, _ = _taught(base, world, {**coarse, "importance": str(path)}, seed)
        found |= _judged(world, model, f"random_{quarter}")
        model, _ = _taught(base, world, {**coarse, "apply": "update"}, seed)
        found |= _judged(world, model, f"update_{quarter}")
    found |= {"frozen_rest": rested, "trained_as_named": trained}
    return found | _search(base, world, seed)


def _taught(base: nn.Module, world: Facts, tuning: dict[str, Any], seed: int) -> tuple[nn.Module, CofiTuned]:
    model, loop = teach(base, world, NEW, tuning, learning_rate=RATE, steps=STEPS, seed=seed)
    assert isinstance(loop.tuned, CofiTuned)
    return model, loop.tuned


def _judged(world: Facts, model: nn.Module, arm: str) -> Measurements:
    (new, _), (old, old_loss) = world.recall(model, NEW), world.recall(model, OLD)
    return {f"new/{arm}": new, f"old/{arm}": old, f"old_loss/{arm}": old_loss, f"sum/{arm}": new + old}


def _rest(base: nn.Module, tuned: CofiTuned) -> bool:
    """Whether all that is frozen is as it was to the last bit."""
    return all(torch.equal(tensor, base.get_parameter(name)) for name, tensor in tuned.frozen().items())


def _dealt_out(importance: Importance, seed: int) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    return {
        block: {kind: values[torch.randperm(len(values), generator=generator)] for kind, values in kinds.items()}
        for block, kinds in importance.items()
    }


def _search(base: nn.Module, world: Facts, seed: int) -> Measurements:
    """Whether the answer of a search is the best of what it trained, as noted beside it; and how that compares."""
    noted: list[tuple[dict[str, Any], float]] = []

    def train(settings: dict[str, Any]) -> tuple[dict[str, Any], nn.Module]:
        tuning = {"method": "cofitune", **settings, "soft_mask": []}
        model, _ = teach(base, world, NEW, tuning, learning_rate=RATE, steps=SEARCH_STEPS, seed=seed)
        return settings, model

    def judge(trained: tuple[dict[str, Any], nn.Module]) -> dict[str, float]:
        settings, model = trained
        scores = {"speciality": world.recall(model, NEW)[0], "versatility": world.recall(model, OLD)[0]}
        noted.append((settings, sum(scores.values())))
        return scores

    ranking = coarse_search(train, judge, paper_tree(BLOCKS, QUARTERS), beam=1, max_runs=10)
    best = max(noted, key=lambda pair: pair[1])
    right = ranking[0]["settings"] == best[0] and len(ranking) == len(noted)
    return {"search_answer_is_argmax": float(right), "search_runs": len(noted), "search_score": best[1]}


def _gap(runs: Any, figure: str, one: str, other: str) -> float:
    """The mean over seeds and quarters of one kind of arm less another."""
    gaps = [r[f"{figure}/{one}_{q}"] - r[f"{figure}/{other}_{q}"] for r in runs for q in QUARTERS]
    return sum(gaps) / len(gaps)


def _some_quarter(run: Measurements, full: str) -> bool:
    return any(
        run[f"old_loss/ff_{q}"] < run[f"old_loss/{full}"] and run[f"new/ff_{q}"] >= run[f"new/{full}"] - 0.03
        for q in QUARTERS
    )


PROOF = Proof(
    paper=4,
    prove=prove,
    parts=[
        "luthier.tune.cofitune",
        "luthier.tune.selector.importance",
        "luthier.tune.selector.importance_score",
        "luthier.tune.selector.layers",
        "luthier.tune.selector.units",
        "luthier.tune.selector.rows",
        "luthier.tune.selector.coarse_search",
        "luthier.worlds.facts",
        "luthier.proofs.facts_bench",
    ],
    claims=[
        Claim(
            "seeds in which some quarter has a lower old loss than full tuning, and new facts within 3 points of it",
            lambda runs: count(runs, lambda r: _some_quarter(r, "full")),
            "== 3",
            "paper",
        ),
        Claim(
            "the same against full tuning at a rate of 3e-4",
            lambda runs: count(runs, lambda r: _some_quarter(r, "full_low_rate")),
            "== 3",
        ),
        Claim(
            "old loss: soft mask less no mask, mean of quarters and seeds",
            lambda runs: _gap(runs, "old_loss", "soft", "ff"),
            "<= 0",
            "paper",
        ),
        Claim(
            "new facts: no mask less soft mask, mean of quarters and seeds",
            lambda runs: _gap(runs, "new", "ff", "soft"),
            "<= 0.02",
            "paper",
        ),
        Claim(
            "old loss: soft mask less the same importance dealt out at random, mean of quarters and seeds",
            lambda runs: _gap(runs, "old_loss", "soft", "random"),
            "< 0",
        ),
        Claim(
            "seeds in which the search answers with the best of what it tried",
            lambda runs: count(runs, lambda r: r["search_answer_is_argmax"] == 1),
            "== 3",
            "exact",
        ),
        Claim(
            "seeds in which all frozen tensors rest to the last bit, and layers times modules move",
            lambda runs: count(runs, lambda r: r["frozen_rest"] == 1 and r["trained_as_named"] == 1),
            "== 3",
            "exact",
        ),
    ],
    notes=[
        "Which quarter is best is a property of the model, so no claim is made about it.",
        "The mask multiplies gradients, as in the paper; AdamW makes a constant factor of a row nearly none.",
    ],
)
