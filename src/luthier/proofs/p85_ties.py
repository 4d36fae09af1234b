"""85, TIES: trimmed differences do not drown each other in noise, and a sign conflict goes to the stronger side.

Block bench (8 logistic regressions, see `block_bench`), 5 seeds: base, single models, their average, task arithmetic
and TIES at three densities, each with its scale searched among the same 15 values, and TIES as it comes (scale 1, no
search). That the elected sign helps does not show there: trimming without an election is recorded beside it. So the
election is proved by construction: two models that oppose each other, one three times as loud.

Counter-check on turned digits, where tuning is dense: what TIES gains on the block bench is not expected there.
"""

from __future__ import annotations

import torch

from luthier.merge.run import merge
from luthier.proofs.base import Claim, Measurements, Proof, count, mean
from luthier.proofs.block_bench import Blocks
from luthier.proofs.turned_digits_bench import turned_digits

DENSITIES = (0.2, 0.05, 0.02)


def prove(seed: int) -> Measurements:
    bench = Blocks(seed)
    found: Measurements = {
        "blocks/base": bench.accuracy(bench.base),
        "blocks/single": bench.single(),
        "blocks/average": bench.accuracy(bench.merged("linear")),
        "blocks/task_arithmetic": bench.tried("task-arithmetic"),
        "blocks/ties_0.2_scale_1": bench.accuracy(bench.merged({"method": "ties", "density": 0.2, "scale": 1.0})),
    }
    for density in DENSITIES:
        found[f"blocks/ties_{density}"] = bench.tried({"method": "ties", "density": density})
    trimmed = {"method": "breadcrumbs", "density": 0.05, "drop_top": 0.0}
    found["blocks/trimmed_only_0.05"] = bench.tried(trimmed)

    loud = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
    base, models = {"w": torch.zeros(1000)}, [{"w": loud}, {"w": -loud / 3}]
    for name, settings in (("ties", {"method": "ties", "density": 1.0, "scale": 1.0}), ("average", "linear")):
        outcome = merge(settings, base=base, models=models).tensors["w"]
        found[f"loud_side_kept/{name}"] = float((outcome / loud).mean())
        found[f"loud_side_error/{name}"] = float((outcome - loud).abs().max())

    digits = turned_digits(seed)
    found |= {
        "digits/base": digits.accuracy(digits.base),
        "digits/single": digits.single(),
        "digits/average": digits.merged("linear"),
        "digits/task_arithmetic": digits.tried("task-arithmetic"),
        "digits/ties_0.2": digits.tried({"method": "ties", "density": 0.2}),
        "digits/ties_0.2_scale_1": digits.merged({"method": "ties", "density": 0.2, "scale": 1.0}),
    }
    return found


PROOF = Proof(
    paper=85,
    prove=prove,
    parts=[
        "luthier.merge.ties",
        "luthier.merge.search",
        "luthier.weights.algebra",
        "luthier.weights.ranks",
        "luthier.proofs.block_bench",
        "luthier.proofs.turned_digits_bench",
    ],
    seeds=(0, 1, 2, 3, 4),
    claims=[
        Claim(
            "blocks: TIES at density 0.2 less task arithmetic, mean",
            lambda runs: mean(runs, "blocks/ties_0.2") - mean(runs, "blocks/task_arithmetic"),
            ">= 0.03",
            "paper",
        ),
        Claim(
            "blocks: TIES at density 0.02 less the single models, mean",
            lambda runs: mean(runs, "blocks/ties_0.02") - mean(runs, "blocks/single"),
            "> 0",
            "ours",
        ),
        Claim(
            "blocks: seeds in which TIES is above task arithmetic at every density",
            lambda runs: count(
                runs, lambda r: min(r[f"blocks/ties_{d}"] for d in DENSITIES) > r["blocks/task_arithmetic"]
            ),
            "== 5",
            "paper",
        ),
        Claim(
            "blocks: TIES at scale 1, nothing searched, less task arithmetic with its scale searched, mean",
            lambda runs: mean(runs, "blocks/ties_0.2_scale_1") - mean(runs, "blocks/task_arithmetic"),
            "> 0",
            "paper",
        ),
        Claim(
            "two that oppose: largest distance of TIES from the louder side",
            lambda runs: max(r["loud_side_error/ties"] for r in runs),
            "== 0",
            "exact",
        ),
        Claim(
            "two that oppose: how far the share that an average keeps is from a third",
            lambda runs: max(abs(r["loud_side_kept/average"] - 1 / 3) for r in runs),
            "<= 1e-6",
            "exact",
        ),
        Claim(
            "blocks: TIES less trimming without an election, both at density 0.05, mean",
            lambda runs: mean(runs, "blocks/ties_0.05") - mean(runs, "blocks/trimmed_only_0.05"),
            "> 0",
            "paper",
            expected=False,
        ),
        Claim(
            "digits: TIES at density 0.2 less task arithmetic, mean",
            lambda runs: mean(runs, "digits/ties_0.2") - mean(runs, "digits/task_arithmetic"),
            "> 0",
            "paper",
            expected=False,
        ),
        Claim(
            "digits: TIES at scale 1, nothing searched, less the plain average, mean",
            lambda runs: mean(runs, "digits/ties_0.2_scale_1") - mean(runs, "digits/average"),
            "> 0",
            "paper",
            expected=False,
        ),
    ],
    notes=[
        "The digits are no test of the paper's benchmarks; they show that on dense tuning TIES has nothing to remove.",
        "There is no figure of the paper's own tables here: those models are not at hand.",
    ],
)
