"""39, fine-tuning transfer: what tuning changed in one checkpoint works on a later one, without training.

A dense reader (64-256-256-10) is pre-trained on digits once; M1 to M4 are its checkpoints after 10, 60, 90 and 100 % of
the steps. Each is tuned on a new task (inverted pictures, each label one higher, 300 pictures), which gives a change
D1 to D4. Measured is the accuracy on the new task of M4 + Dj for all j, and of M1 + D4; then of M4 with the change of a
base of another seed; the steps that tuning from M4 + D3 takes to the loss at which tuning of M4 ends; recycling over
all four (iterative, direct) against plain tuning, with a tenth of the steps each, where there is something to gain;
barrier and cosine between the bases.

The share recovered is that of the gain which tuning M4 itself brings. All means over three seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from luthier.merge.run import merge
from luthier.merge.transfer import Transfer
from luthier.merge.valley import barrier, change_cosine
from luthier.pipeline.recycle import recycle
from luthier.proofs.base import Claim, Measurements, Proof, count, mean
from luthier.proofs.digits_bench import accuracy_of, fit, loss_of, mlp, put, state
from luthier.worlds.digits import digits

WIDTHS = (64, 256, 256, 10)
STEPS, POINTS = 600, (60, 360, 540, 600)  # of pre-training; after which the checkpoints are taken
TUNING, SHORT = 200, 20  # steps of tuning; of each round of recycling
RATE, NEW = 1e-3, 300


def prove(seed: int) -> Measurements:
    pictures, labels = digits("train")
    tests, answers = digits("test")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    task = 1 - pictures[order[:NEW]], (labels[order[:NEW]] + 1) % 10
    judged = 1 - tests, (answers + 1) % 10
    old = pictures[order[NEW:]], labels[order[NEW:]]
    model = mlp(WIDTHS, seed)
    bases = checkpoints(model, *old, seed)
    strange = checkpoints(mlp(WIDTHS, seed + 1000), *old, seed + 1000)[-1]

    def tune(base: dict[str, Tensor], steps: int = TUNING) -> dict[str, Tensor]:
        return state(fit(put(model, base), *task, steps=steps, rate=RATE, seed=seed))

    def right(tensors: dict[str, Tensor]) -> float:
        return accuracy_of(model, tensors, *judged)

    def moved(target: dict[str, Tensor], source: dict[str, Tensor], made: dict[str, Tensor]) -> dict[str, Tensor]:
        return merge(Transfer(source_base=source), base=target, models=[made]).tensors

    found: Measurements = {}
    made = [tune(base) for base in bases]
    last = bases[-1]
    found["new/m4"], found["new/tuned_m4"] = right(last), right(made[-1])
    found["new/m1"], found["new/tuned_m1"] = right(bases[0]), right(made[0])
    for number in (1, 2, 3):
        found[f"new/m4+d{number}"] = right(moved(last, bases[number - 1], made[number - 1]))
        found[f"cosine/d{number}"] = change_cosine(made[number - 1], bases[number - 1], last)
        between = barrier(bases[number - 1], last, lambda tensors: loss_of(model, tensors, tests, answers))
        found[f"barrier/m{number}"] = between.height
    found["new/m1+d4"] = right(moved(bases[0], last, made[-1]))
    found["new/m4+other_seed"] = right(moved(last, strange, tune(strange)))
    found["barrier/other_seed"] = barrier(strange, last, lambda t: loss_of(model, t, tests, answers)).height
    ended = loss_of(model, made[-1], *task)
    found["steps"] = float(steps_to(ended, put(model, moved(last, bases[2], made[2])), task, seed))

    def brief(base: dict[str, Tensor]) -> dict[str, Tensor]:
        return tune(base, SHORT)

    found["recycled/plain"] = right(brief(last))
    found["recycled/direct"] = right(recycle(bases, brief, "direct").tuned)
    found["recycled/iterative"] = right(recycle(bases, brief).tuned)
    return found


def checkpoints(model: torch.nn.Module, pictures: Tensor, labels: Tensor, seed: int) -> list[dict[str, Tensor]]:
    """Pre-train `model` in place; its tensors after each of `POINTS` steps."""
    kept: list[dict[str, Tensor]] = []

    def keep(step: int) -> None:
        if step in POINTS:
            kept.append(state(model))

    fit(model, pictures, labels, steps=STEPS, rate=1e-3, seed=seed, each=keep)
    return kept


def steps_to(loss: float, model: torch.nn.Module, task: tuple[Tensor, Tensor], seed: int) -> int:
    """Steps of tuning until the loss on the task's pictures is at most `loss`; `TUNING` + 1 if it is not reached."""
    if loss_of(model, state(model), *task) <= loss:
        return 0
    reached = TUNING + 1

    def look(step: int) -> None:
        nonlocal reached
        if reached > TUNING and loss_of(model, state(model), *task) <= loss:
            reached = step

    fit(model, *task, steps=TUNING, rate=RATE, seed=seed, each=look)
    return reached


def recovered(run: Measurements, arm: str, base: str = "m4") -> float:
    """Share of the gain that tuning the base itself brings."""
    gain = run[f"new/tuned_{base}"] - run[f"new/{base}"]
    return (run[f"new/{arm}"] - run[f"new/{base}"]) / gain


def _mean_recovered(arm: str, base: str = "m4") -> Callable[[Sequence[Measurements]], float]:
    return lambda runs: sum(recovered(run, arm, base) for run in runs) / len(runs)


PROOF = Proof(
    paper=39,
    prove=prove,
    parts=[
        "luthier.merge.transfer",
        "luthier.merge.valley",
        "luthier.pipeline.recycle",
        "luthier.worlds.digits",
        "luthier.proofs.digits_bench",
    ],
    claims=[
        Claim("gain recovered by M4 + D3, without training", _mean_recovered("m4+d3"), ">= 0.8", "paper"),
        Claim("gain recovered by M4 + D1 (a base far back)", _mean_recovered("m4+d1"), "< 0.5", "paper"),
        Claim(
            "gain recovered by M1 + D4 (backporting to a weak base)", _mean_recovered("m1+d4", "m1"), "< 0.5", "paper"
        ),
        Claim("gain recovered from a base of another seed", _mean_recovered("m4+other_seed"), "<= 0.1"),
        Claim(
            f"seeds in which tuning from M4 + D3 reaches the loss of tuning M4 in half of its {TUNING} steps",
            lambda runs: count(runs, lambda run: run["steps"] <= TUNING / 2),
            "== 3",
            "paper",
        ),
        Claim(
            f"iterative recycling above plain tuning ({SHORT} steps a round), accuracy",
            lambda runs: mean(runs, "recycled/iterative") - mean(runs, "recycled/plain"),
            "> 0",
            "paper",
        ),
        Claim(
            "iterative recycling above direct, accuracy",
            lambda runs: mean(runs, "recycled/iterative") - mean(runs, "recycled/direct"),
            "> 0",
            "paper",
        ),
        Claim(
            "barrier to another seed less the highest barrier within the run, in nats",
            lambda runs: min(r["barrier/other_seed"] - max(r[f"barrier/m{n}"] for n in (1, 2, 3)) for r in runs),
            "> 0",
            "ours",
        ),
    ],
)
