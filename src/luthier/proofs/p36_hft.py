"""36, HFT: freezing a random half of every kind of matrix keeps more old knowledge, and new facts are learnt as well.

Facts world, 3 seeds. First part: a model that knows 840 facts learns 120 new ones with full tuning, HFT by category
and HFT by layer, same rate and steps. Second part: a model that knows 480 facts learns four relations one after the
other, each a phase with a draw of its own; backward transfer is the mean change of a relation's recall from right
after it was learnt to the end.
"""

from __future__ import annotations

from statistics import fmean

from luthier.proofs.base import Claim, Measurements, Proof, count, mean, worst
from luthier.proofs.facts_bench import teach
from luthier.worlds.facts import Facts

ARMS = {
    "full": {"method": "full"},
    "hft": {"method": "hft"},
    "hft_layer": {"method": "hft", "granularity": "layer"},
}
OLD, NEW = range(7), range(7, 8)
SEQUENCE = range(4, 8)


def prove(seed: int) -> Measurements:
    world = Facts(seed)
    base = world.pretrained(OLD)
    found: Measurements = {"old/base": world.recall(base, OLD)[0]}
    for arm, tuning in ARMS.items():
        model, _ = teach(base, world, NEW, tuning, seed=seed)
        found[f"new/{arm}"] = world.recall(model, NEW)[0]
        found[f"old/{arm}"], found[f"old_loss/{arm}"] = world.recall(model, OLD)
    start = world.pretrained(range(4))
    for arm in ("full", "hft"):
        model, after = start, []
        for number, relation in enumerate(SEQUENCE):
            model, _ = teach(model, world, [relation], ARMS[arm], seed=10 * seed + number)
            model.requires_grad_(True)
            after.append(world.recall(model, [relation])[0])
        final = [world.recall(model, [relation])[0] for relation in SEQUENCE]
        found[f"sequence_final/{arm}"] = fmean(final)
        found[f"sequence_transfer/{arm}"] = fmean(f - a for f, a in zip(final[:-1], after[:-1], strict=True))
    return found


PROOF = Proof(
    paper=36,
    prove=prove,
    parts=[
        "luthier.tune.hft",
        "luthier.tune.selector.tensors",
        "luthier.tune.whole",
        "luthier.worlds.facts",
        "luthier.proofs.facts_bench",
    ],
    claims=[
        Claim("the base knows its 840 facts, all seeds", lambda runs: worst(runs, "old/base"), ">= 0.99"),
        Claim("full tuning learns the new facts, all seeds", lambda runs: worst(runs, "new/full"), ">= 0.95"),
        Claim("HFT learns them too, all seeds", lambda runs: worst(runs, "new/hft"), ">= 0.95", "paper"),
        Claim(
            "seeds in which HFT's loss on old facts is lower",
            lambda runs: count(runs, lambda r: r["old_loss/hft"] < r["old_loss/full"]),
            "== 3",
            "paper",
        ),
        Claim(
            "share of old facts that HFT keeps beyond full tuning, mean",
            lambda runs: mean(runs, "old/hft") - mean(runs, "old/full"),
            ">= 0.08",
            "paper",
        ),
        Claim(
            "a sequence of four relations: HFT's final recall less full tuning's, mean",
            lambda runs: mean(runs, "sequence_final/hft") - mean(runs, "sequence_final/full"),
            ">= 0",
            "paper",
        ),
        Claim(
            "the same for backward transfer",
            lambda runs: mean(runs, "sequence_transfer/hft") - mean(runs, "sequence_transfer/full"),
            ">= 0",
            "paper",
        ),
        Claim(
            "by category keeps more than by layer, mean",
            lambda runs: mean(runs, "old/hft") - mean(runs, "old/hft_layer"),
            "> 0",
            "paper",
        ),
    ],
)
