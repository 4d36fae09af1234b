"""17, domain adaptation with SLERP: a model tuned on a domain, merged with the general one, is above the parents' mean.

Facts world. Six relations are general knowledge, two are a domain. The base knows the general facts as statements
(subject, relation, object); instruct is the base tuned to answer questions about them (a mark, subject, relation). The
chain goes on from either: CPT learns the domain's facts as statements, SFT then the question form on half of them.
Judged are answers to questions, general ones and those of the domain's other half, which no model was asked in
training; overall is the mean of both.

Every stage's model is merged with instruct: SLERP at t = 0.5, the plain mean, and the paper's two gradients (attention
and feed-forward turned against each other along depth). Four cells (from base or instruct, after CPT or after SFT),
three seeds. Synergy is the merged score less the mean of the parents'.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.evaluate.synergy import synergy
from luthier.merge.base import Merge
from luthier.merge.linear import Linear
from luthier.merge.run import merge
from luthier.merge.slerp import Slerp
from luthier.proofs.base import Claim, Measurements, Proof, mean
from luthier.worlds.facts import Facts

GENERAL, DOMAIN = range(6), range(6, 8)
MARK = 188  # a token that no statement holds
METHODS: dict[str, Merge] = {
    "slerp": Slerp(),
    "linear": Linear(),
    "gradient": Slerp(t={"self_attn": [0, 0.5, 0.3, 0.7, 1], "mlp": [1, 0.5, 0.7, 0.3, 0], "*": 0.5}),
    "gradient_2": Slerp(t={"self_attn": [0, 0.3, 0.5, 0.7, 1], "mlp": [1, 0.7, 0.5, 0.3, 0], "*": 0.5}),
}


def prove(seed: int) -> Measurements:
    world = Facts(seed)
    general, domain = (torch.tensor(world.triples(relations)) for relations in (GENERAL, DOMAIN))
    order = torch.randperm(len(domain), generator=torch.Generator().manual_seed(seed))
    practised, judged = domain[order[: len(domain) // 2]], domain[order[len(domain) // 2 :]]
    base = world.pretrained(GENERAL)
    instruct = taught(base, questions(general), steps=200, seed=seed)

    def scores(model: nn.Module) -> tuple[float, float]:
        return answered(model, questions(judged)), answered(model, questions(general))

    found: Measurements = {}
    cells: dict[str, list[tuple[float, bool]]] = {name: [] for name in METHODS}
    cosines: list[float] = []
    ours = scores(instruct)
    found |= {"domain/instruct": ours[0], "general/instruct": ours[1], "overall/instruct": fmean(ours)}
    for start, model in (("base", base), ("instruct", instruct)):
        cpt = taught(model, domain, steps=300, seed=seed)
        sft = taught(cpt, questions(practised), steps=100, seed=seed)
        for stage, made in (("cpt", cpt), ("sft", sft)):
            cell, theirs = f"{start}_{stage}", scores(made)
            found |= {f"domain/{cell}": theirs[0], f"general/{cell}": theirs[1], f"overall/{cell}": fmean(theirs)}
            for name, method in METHODS.items():
                result = merge(method, models=[instruct, made])
                got = scores(loaded(base, result.tensors))
                rows = {n: (ours[i], theirs[i], got[i]) for i, n in enumerate(("domain", "general"))}
                overall = synergy(rows)[-1]
                cells[name].append((overall.synergy, overall.emergent))
                found[f"merged_{cell}/{name}"] = overall.merged
                if name == "slerp":
                    cosines += [row["cosine"] for row in result.report["tensors"].values()]
                    found[f"spherical/{cell}"] = result.report["total"]["path"].get("spherical", 0) / len(
                        result.report["tensors"]
                    )
    for name, pairs in cells.items():
        found[f"synergy/{name}"] = fmean(value for value, _ in pairs)
        found[f"emergent/{name}"] = fmean(float(more) for _, more in pairs)
    return found | {"cosine": fmean(cosines)}


def questions(facts: Tensor) -> Tensor:
    """Statements (n, 3) as questions with answers (n, 4): a mark, subject, relation; object."""
    return torch.cat([torch.full((len(facts), 1), MARK), facts], 1)


def taught(model: nn.Module, rows: Tensor, *, steps: int, seed: int) -> nn.Module:
    """A copy after `steps` of AdamW (rate 1e-3, batches of 64) on the last token of `rows`."""
    made = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3, weight_decay=0.0)
    made.train()
    for _ in range(steps):
        chosen = rows[torch.randint(0, len(rows), (64,), generator=draw)]
        F.cross_entropy(_logits(made, chosen), chosen[:, -1]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return made.eval()


@torch.no_grad()
def answered(model: nn.Module, rows: Tensor) -> float:
    """Share of rows whose last token is the model's first choice."""
    return float((_logits(model, rows).argmax(-1) == rows[:, -1]).float().mean())


def loaded(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy with these tensors."""
    made = copy.deepcopy(model)
    made.load_state_dict(tensors)
    return made.eval()


def _logits(model: nn.Module, rows: Tensor) -> Tensor:
    caller: Any = model
    return caller(input_ids=rows[:, :-1], use_cache=False).logits[:, -1]


def _gap(a: str, b: str) -> Callable[[Sequence[Measurements]], float]:
    return lambda runs: mean(runs, a) - mean(runs, b)


PROOF = Proof(
    paper=17,
    prove=prove,
    parts=["luthier.merge.slerp", "luthier.merge.linear", "luthier.evaluate.synergy", "luthier.worlds.facts"],
    claims=[
        Claim(
            "overall score of SLERP (t = 0.5) above the mean of its parents', mean of cells and seeds",
            lambda runs: mean(runs, "synergy/slerp"),
            ">= 0",
            "paper",
        ),
        Claim(
            "share of cells in which SLERP (t = 0.5) is above both parents",
            lambda runs: mean(runs, "emergent/slerp"),
            "> 0.5",
            "paper",
            expected=False,
        ),
        Claim(
            "synergy of SLERP and of the plain mean, difference",
            lambda runs: abs(mean(runs, "synergy/slerp") - mean(runs, "synergy/linear")),
            "<= 0.02",
        ),
        Claim(
            "the better gradient's synergy above SLERP's at t = 0.5",
            lambda runs: (
                max(mean(runs, "synergy/gradient"), mean(runs, "synergy/gradient_2")) - mean(runs, "synergy/slerp")
            ),
            "> 0",
            "paper",
            expected=False,
        ),
        Claim(
            "general score: what CPT from instruct loses of instruct's",
            _gap("general/instruct", "general/instruct_cpt"),
            "> 0",
            "paper",
        ),
    ],
    notes=[
        "At t = 0.5 raw SLERP is the mean times 1/cos(omega/2), so at these cosines it answers as the mean does.",
        "The paper finds no synergy at 1.7B parameters either; whether a merge is above both parents is open here.",
    ],
)
