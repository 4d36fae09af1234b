"""16, Breadcrumbs: leaving out the largest changes saves a merge from accidents, leaving out small ones from noise.

Block bench (see `block_bench`), 5 seeds, with and without outliers: task arithmetic, the largest 15 % alone, TIES and
breadcrumbs, each with its scale searched among the same 15 values. Where nothing is an outlier, leaving out the
largest 2 % costs skill; that is recorded.

Transfer, the paper's second claim: density, drop_top and scale of breadcrumbs and the scale of task arithmetic are
searched on the first two tasks only, then 2, 4, 6 and 8 tasks are merged with them; accuracy is told over that of the
single models. Support, without training: a sparse signal between outliers and dense noise, and what is kept of it.
On turned digits, where tuning is dense, no gain over task arithmetic is expected.
"""

from __future__ import annotations

from statistics import fmean

import torch

from luthier.merge.run import merge
from luthier.proofs.base import Claim, Measurements, Proof, mean, worst
from luthier.proofs.block_bench import SCALES, Blocks
from luthier.proofs.turned_digits_bench import turned_digits

TRANSFER = {
    "breadcrumbs": {"density": [0.05, 0.1, 0.15, 0.2], "drop_top": [0.0, 0.0025, 0.005, 0.01], "scale": SCALES},
    "task-arithmetic": {"scale": SCALES},
}
COUNTS = (2, 4, 6, 8)


def crumbs(density: float, drop_top: float) -> dict[str, object]:
    return {"method": "breadcrumbs", "density": density, "drop_top": drop_top}


def prove(seed: int) -> Measurements:
    found: Measurements = {}
    for name, bench in (("plain", Blocks(seed)), ("outliers", Blocks(seed, outliers=True))):
        found |= {
            f"{name}/task_arithmetic": bench.tried("task-arithmetic"),
            f"{name}/largest_0.15": bench.tried(crumbs(0.15, 0.0)),
            f"{name}/largest_0.05": bench.tried(crumbs(0.05, 0.0)),
            f"{name}/ties_0.2": bench.tried({"method": "ties", "density": 0.2}),
            f"{name}/breadcrumbs_0.15_0.02": bench.tried(crumbs(0.15, 0.02)),
        }
        for method, grid in TRANSFER.items():
            chosen = bench.search(method, grid, tasks=range(2)).settings
            for tasks in (range(number) for number in COUNTS):
                share = bench.accuracy(bench.merged(chosen, tasks), tasks) / bench.single(tasks)
                found[f"transfer_{name}_{len(tasks)}/{method}"] = share
    found |= _support(seed)
    digits = turned_digits(seed)
    found["digits/task_arithmetic"] = digits.tried("task-arithmetic")
    found["digits/breadcrumbs"] = digits.tried(crumbs(0.15, 0.007))
    return found


def _support(seed: int) -> Measurements:
    """Precision and recall of what moves, against 1,500 of 10,000 weights that carry the signal; 70 are outliers."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.randperm(10_000, generator=draw)
    tau = 0.01 * torch.randn(10_000, generator=draw)
    tau[places[:1500]] = (0.1 + 0.1 * torch.rand(1500, generator=draw)) * (
        2.0 * torch.randint(0, 2, (1500,), generator=draw) - 1
    )
    tau[places[1500:1570]] = 20.0
    signal, outlier = (torch.zeros(10_000, dtype=torch.bool) for _ in range(2))
    signal[places[:1500]], outlier[places[1500:1570]] = True, True
    base = {"w": torch.zeros(100, 100)}
    found: Measurements = {}
    for name, settings in (
        ("window", crumbs(0.15, 0.007)),
        ("largest", crumbs(0.15, 0.0)),
        ("all", {"method": "task-arithmetic"}),
    ):
        moved = merge(settings, base=base, models=[{"w": tau.view(100, 100)}]).tensors["w"].view(-1) != 0
        found[f"precision/{name}"] = float((moved & signal).sum() / moved.sum())
        found[f"recall/{name}"] = float((moved & signal).sum() / signal.sum())
        found[f"outliers_kept/{name}"] = float((moved & outlier).sum() / outlier.sum())
    return found


def _fall(runs: list[Measurements], name: str, method: str) -> float:
    """How much less of the single models' accuracy is left with 4, 6 and 8 tasks than with 2, mean."""
    left = [mean(runs, f"transfer_{name}_{number}/{method}") for number in COUNTS]
    return left[0] - fmean(left[1:])


PROOF = Proof(
    paper=16,
    prove=prove,
    parts=[
        "luthier.merge.breadcrumbs",
        "luthier.merge.search",
        "luthier.weights.ranks",
        "luthier.proofs.block_bench",
        "luthier.proofs.turned_digits_bench",
    ],
    seeds=(0, 1, 2, 3, 4),
    claims=[
        Claim(
            "with outliers: breadcrumbs (0.15, 0.02) less the largest 15 %, mean",
            lambda runs: mean(runs, "outliers/breadcrumbs_0.15_0.02") - mean(runs, "outliers/largest_0.15"),
            ">= 0.05",
            "paper",
        ),
        Claim(
            "without outliers: breadcrumbs (0.15, 0) less task arithmetic, mean",
            lambda runs: mean(runs, "plain/largest_0.15") - mean(runs, "plain/task_arithmetic"),
            ">= 0.01",
            "paper",
        ),
        Claim(
            "without outliers: breadcrumbs (0.15, 0.02) less task arithmetic, mean",
            lambda runs: mean(runs, "plain/breadcrumbs_0.15_0.02") - mean(runs, "plain/task_arithmetic"),
            "> 0",
            "paper",
            expected=False,
        ),
        Claim(
            "settings of 2 tasks used for 4, 6 and 8: fall of task arithmetic less that of breadcrumbs, mean",
            lambda runs: _fall(list(runs), "plain", "task-arithmetic") - _fall(list(runs), "plain", "breadcrumbs"),
            "> 0",
            "paper",
        ),
        Claim("support: precision of the window", lambda runs: worst(runs, "precision/window"), "> 0.95", "exact"),
        Claim("support: recall of the window", lambda runs: worst(runs, "recall/window"), "> 0.95", "exact"),
        Claim(
            "support: share of the outliers that the largest alone keep, all seeds",
            lambda runs: worst(runs, "outliers_kept/largest"),
            "== 1",
            "exact",
        ),
        Claim(
            "support: precision of the whole difference, most",
            lambda runs: max(r["precision/all"] for r in runs),
            "< 0.2",
            "exact",
        ),
        Claim(
            "digits: breadcrumbs less task arithmetic, mean",
            lambda runs: mean(runs, "digits/breadcrumbs") - mean(runs, "digits/task_arithmetic"),
            "> 0",
            "paper",
            expected=False,
        ),
    ],
    notes=[
        "Without outliers the 8 largest of 400 weights are skill: leaving them out is the wrong setting there.",
        (
            "With the settings of 2 tasks breadcrumbs keeps more than task arithmetic at every count of tasks (from "
            "1.04 to 0.92 of the single models' accuracy against 0.93 to 0.83), but from 2 tasks on it falls a "
            "little more."
        ),
    ],
)
