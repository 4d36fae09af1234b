"""90, SaRA: the smallest weights can be removed without harm, and stepping only them forgets less than full tuning.

Facts world with 4 blocks, 3 seeds; all tunings make 200 steps at the rate 2e-3.
(a) The smallest 10% and 20% of the blocks' weights set to zero, against a random and the largest 20%: loss on old ones.
(b) 120 new facts learnt by SaRA (the smallest 20% of all entries), by a random and the largest 20% of them, by LoRA of
    as many parameters, by full tuning: how many new facts are known, how many old ones are left.
(c) SaRA without its switch, and without its nuclear term: nuclear norm of the entries that move at the end, and
    effective rank (the exponential of the entropy of the singular values) of the change; means over matrices.

A small U-Net of diffusers that has learnt to draw the digits 0 to 7 (500 steps): (a) again, by its loss on test
pictures; then 150 steps on 8 and 9 at the rate 2e-3, by SaRA and by full tuning. A network that reads digits judges
what is drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luthier.models.topology import Topology
from luthier.proofs.base import Claim, Measurements, Proof, count, mean
from luthier.proofs.facts_bench import teach
from luthier.tune import Full, Probe, Sara, Tuning
from luthier.tune.sara import SaraTuned, nuclear_norm
from luthier.tune.selector.choose import Share, Top
from luthier.tune.selector.entries import SelectsEntries, select
from luthier.tune.selector.scores import Magnitude, Random
from luthier.tune.selector.slots import Once, Slots, View
from luthier.worlds import diffusion
from luthier.worlds.digits import accuracy, digits, reader, train
from luthier.worlds.facts import Facts

OLD, NEW, RATE = range(7), range(7, 8), 2e-3
DRAWN, OTHERS = range(8), (8, 9)
SARA = {"density": 0.2, "rank_min_dim": 32}


class Fifth(SelectsEntries):
    """A fifth of all entries, random or the largest, chosen once; for comparison."""

    method: Literal["fifth"] = "fifth"
    score: Literal["random", "largest"] = "random"
    scope: tuple[str, ...] = ()

    def slots(self) -> Slots:
        score = Random() if self.score == "random" else Magnitude()
        return replace(
            Sara(density=0.2, scope=self.scope).slots(), score=score, choose=Top(Share(0.2)), schedule=Once()
        )


REMOVED: Mapping[str, Any] = {
    "smallest10": lambda scope: Sara(density=0.1, scope=scope),
    "smallest20": lambda scope: Sara(density=0.2, scope=scope),
    "random20": lambda scope: Fifth(scope=scope),
    "largest20": lambda scope: Fifth(score="largest", scope=scope),
}


def prove(seed: int) -> Measurements:
    return _facts(seed) | _pictures(seed)


def _facts(seed: int) -> Measurements:
    world = Facts(seed)
    base = world.pretrained(OLD)
    found: Measurements = {"zeroed_loss/base": world.recall(base, OLD)[1]}
    for arm, of in REMOVED.items():
        found[f"zeroed_loss/{arm}"] = world.recall(_zeroed(base, of(("layers",)), seed), OLD)[1]
    arms: dict[str, Any] = {
        "sara": Sara(**SARA),
        "no_switch": Sara(**SARA, progressive_at=None),
        "no_norm": Sara(**SARA, lambda_rank=0.0),
        "random": Fifth(),
        "largest": Fifth(score="largest"),
        "lora": {"method": "lora", "rank": _rank(base)},
        "full": {"method": "full"},
    }
    for arm, tuning in arms.items():
        model, loop = teach(base, world, NEW, tuning, learning_rate=RATE, steps=200, seed=seed)
        (new, _), (old, old_loss) = world.recall(model, NEW), world.recall(model, OLD)
        found |= {f"new/{arm}": new, f"old/{arm}": old, f"old_loss/{arm}": old_loss}
        if isinstance(loop.tuned, SaraTuned):
            found[f"norm/{arm}"], found[f"rank/{arm}"] = _norm_and_rank(base, loop.tuned)
    return found


def _pictures(seed: int) -> Measurements:
    judge = train(reader("convolution", seed=seed), *digits("train"))
    old, new = digits("test", DRAWN), digits("test", OTHERS)
    base = diffusion.unet(seed)
    diffusion.train(_attached(Full(), base, seed), *digits("train", DRAWN), steps=500, rate=RATE, seed=seed)
    found: Measurements = {"unet_zeroed_loss/base": diffusion.noise_loss(base, *old)}
    for arm, of in REMOVED.items():
        found[f"unet_zeroed_loss/{arm}"] = diffusion.noise_loss(_zeroed(base, of(()), seed), *old)
    networks = {"base": base}
    for arm, tuning in {"sara": Sara(**SARA), "full": Full()}.items():
        tuned = _attached(tuning, copy.deepcopy(base), seed)
        networks[arm] = diffusion.train(tuned, *digits("train", OTHERS), steps=150, rate=RATE, seed=seed)
    for arm, network in networks.items():
        found[f"unet_old_loss/{arm}"] = diffusion.noise_loss(network, *old)
        found[f"unet_new_loss/{arm}"] = diffusion.noise_loss(network, *new)
        for what, labels in (("old", DRAWN), ("new", OTHERS)):
            asked = torch.tensor(list(labels)).repeat(160 // len(labels))
            found[f"unet_{what}_read/{arm}"] = accuracy(judge, diffusion.draw(network, asked, seed=seed), asked)
    return found


def _attached(tuning: Tuning, network: nn.Module, seed: int) -> Any:
    return tuning.attach(network, Probe(Topology.flat(network), seed))


def _zeroed(base: nn.Module, tuning: SelectsEntries, seed: int) -> nn.Module:
    """The model with 0 where these settings would choose."""
    model = copy.deepcopy(base)
    for name, places in select(tuning.slots(), View(model, Probe(Topology.flat(model), seed))).items():
        model.get_parameter(name).detach().view(-1)[places] = 0.0
    return model


def _rank(base: nn.Module) -> int:
    """Of the LoRA on all linears with about as many parameters as a fifth of the model."""
    sides = sum(sum(base.get_parameter(f"{path}.weight").shape) for path in Topology.of(base).linears())
    return round(0.2 * sum(p.numel() for p in base.parameters()) / sides)


def _norm_and_rank(base: nn.Module, tuned: SaraTuned) -> tuple[float, float]:
    names = tuned.eligible()
    norms = [float(nuclear_norm(tuned.matrix(name))[0]) for name in names]
    ranks = [_effective_rank(tuned.model.get_parameter(n).detach() - base.get_parameter(n).detach()) for n in names]
    return sum(norms) / len(names), sum(ranks) / len(names)


def _effective_rank(change: Tensor) -> float:
    values = torch.linalg.svdvals(change.double())
    shares = values[values > 0] / values.sum()
    return float((-(shares * shares.log()).sum()).exp())


def _rise(run: Measurements, arm: str, what: str = "zeroed_loss") -> float:
    return run[f"{what}/{arm}"] - run[f"{what}/base"]


def _relative(run: Measurements, arm: str, what: str = "zeroed_loss") -> float:
    return abs(_rise(run, arm, what)) / run[f"{what}/base"]


PROOF = Proof(
    paper=90,
    prove=prove,
    parts=[
        "luthier.tune.sara",
        "luthier.tune.selector.entries",
        "luthier.tune.selector.compact",
        "luthier.tune.selector.places",
        "luthier.tune.selector.choose",
        "luthier.worlds.facts",
        "luthier.worlds.diffusion",
        "luthier.proofs.facts_bench",
    ],
    claims=[
        Claim(
            "relative change of the loss on old facts, the smallest 10% zeroed, worst seed",
            lambda runs: max(_relative(r, "smallest10") for r in runs),
            "< 0.02",
            "paper",
        ),
        Claim(
            "the same with the smallest 20% zeroed",
            lambda runs: max(_relative(r, "smallest20") for r in runs),
            "< 0.02",
            "paper",
            expected=False,
        ),
        Claim(
            "the same in nats",
            lambda runs: max(abs(_rise(r, "smallest20")) for r in runs),
            "< 0.02",
        ),
        Claim(
            "loss on old facts with a random 20% zeroed over that with the smallest 20% zeroed, worst seed",
            lambda runs: min(r["zeroed_loss/random20"] / r["zeroed_loss/smallest20"] for r in runs),
            "> 3",
            "paper",
        ),
        Claim(
            "seeds in which SaRA keeps at least 0.2 more old facts than full tuning, with 0.95 of the new ones learnt",
            lambda runs: count(runs, lambda r: r["old/sara"] - r["old/full"] >= 0.2 and r["new/sara"] >= 0.95),
            "== 3",
            "paper",
        ),
        Claim(
            "seeds in which the loss on old facts is below that of full tuning",
            lambda runs: count(runs, lambda r: r["old_loss/sara"] < r["old_loss/full"]),
            "== 3",
            "paper",
        ),
        *(
            Claim(
                f"old facts: SaRA less {words}, mean",
                lambda runs, arm=arm: mean(runs, "old/sara") - mean(runs, f"old/{arm}"),  # type: ignore[misc]
                "> 0",
                "paper",
                expected=False,
            )
            for arm, words in (
                ("random", "random entries"),
                ("largest", "the largest entries"),
                ("lora", "LoRA of as many parameters"),
            )
        ),
        Claim(
            "seeds in which the nuclear term lowers the nuclear norm of the moving entries",
            lambda runs: count(runs, lambda r: r["norm/sara"] < r["norm/no_norm"]),
            "== 3",
            "paper",
        ),
        Claim(
            "seeds in which it lowers the effective rank of the change",
            lambda runs: count(runs, lambda r: r["rank/sara"] < r["rank/no_norm"]),
            "== 3",
            "paper",
        ),
        *(
            Claim(
                f"U-Net: relative change of the loss, the smallest {share}% zeroed, worst seed",
                lambda runs, share=share: max(  # type: ignore[misc]
                    _relative(r, f"smallest{share}", "unet_zeroed_loss") for r in runs
                ),
                "< 0.02",
                "paper",
            )
            for share in (10, 20)
        ),
        Claim(
            "U-Net: rise of the loss with a random 20% zeroed over the change with the smallest 20%, worst seed",
            lambda runs: min(
                _rise(r, "random20", "unet_zeroed_loss") / abs(_rise(r, "smallest20", "unet_zeroed_loss")) for r in runs
            ),
            "> 3",
            "paper",
        ),
        Claim(
            "U-Net: seeds in which the loss on old digits is below that of full tuning",
            lambda runs: count(runs, lambda r: r["unet_old_loss/sara"] < r["unet_old_loss/full"]),
            "== 3",
            "paper",
        ),
        Claim(
            "U-Net: loss on new digits over that of full tuning, mean",
            lambda runs: mean(runs, "unet_new_loss/sara") / mean(runs, "unet_new_loss/full"),
            "<= 1.1",
        ),
        Claim(
            "U-Net: share of drawn old digits that are read as asked, less that of full tuning, mean",
            lambda runs: mean(runs, "unet_old_read/sara") - mean(runs, "unet_old_read/full"),
            "> 0",
            "paper",
        ),
    ],
    notes=[
        "The loss on facts known by heart is some 0.0003 nats; hence the change in nats beside the relative one.",
        "With 20% zeroed the specification's calibration had it at 0.0004 already.",
    ],
)
