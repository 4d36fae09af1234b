"""59, the SFT recipe for small models: do large batches, low gradient norms and high early losses mark the better run?

(A) exact. With the effective batch fixed, micro-batches of 1, 4 and 16 rows of different lengths give one loss and
one gradient.

(B) direction. A tiny decoder (2 blocks, width 64) is pre-trained on six arithmetic skills: four of them until it knows
them, two (`sort`, `swap`) with 40 rows each, so that there is something left to learn. It is then tuned on 4,000 rows
of those two, 15% of them with the answer of another row, on the grid batch {16, 128, 512} x rate {1e-4, 3e-4, 1e-3,
3e-3}, all runs on equally many samples, rate constant, no warm-up. The score of a run is the share of clean held-out
questions answered right, over the two skills plus over the four others, in points (0 to 200). Early is the recipe's own
window: 5% of the samples, at least 20 steps of the largest batch, cut where all runs end a step. Then, at batch 512
with its best rate: warm-up over a tenth of the steps, cosine decay, and phases (`sort` first, then `swap` with a
quarter of the `sort` rows replayed, each phase handing on its best checkpoint by validation loss).

(C) exact. `rank_runs` gives the documented order on histories written by hand.

Two seeds. The model is smaller than the 3-7 billion parameters of the study by four orders of magnitude and its skills
are no language, so (B) may fail to show; its claims stay as they were written down before. The warm-up arm names the
schedule `constant_with_warmup`: `constant` has none, and a first record had compared a run with itself.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.data.collate import pad_batch
from luthier.data.encode import Encoded
from luthier.methods import build
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.objectives.batch import IGNORED
from luthier.proofs.base import Claim, Measurements, Proof, mean
from luthier.train import EarlyDynamics, Loop, Span, TrainSettings, rank_runs, stop_dominated
from luthier.train.early_dynamics import Moment, decision_samples
from luthier.tune import Probe
from luthier.worlds import arithmetic

TUNED, KEPT = ("sort", "swap"), ("copy", "larger", "reverse", "smaller")
BATCHES, RATES = (16, 128, 512), (1e-4, 3e-4, 1e-3, 3e-3)
ROWS, WRONG, EPOCHS, HELD_OUT, VALIDATION = 4000, 0.15, 6, 500, 400
NAMES = ("pad", ",", "=", "end", *"0123456789", *TUNED, *KEPT)
IDS = {name: number for number, name in enumerate(NAMES)}


class Rows:
    """Encoded questions and answers, the labels on the answer and its end."""

    def __init__(self, pairs: Iterable[tuple[list[int], list[int]]]):
        self.pairs = list(pairs)
        self.lengths = np.array([len(q) + len(a) for q, a in self.pairs])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Encoded:
        question, answer = self.pairs[index]
        return {"input_ids": question + answer, "labels": [IGNORED] * len(question) + answer}


def questions(skill: str, count: int, seed: int, part: str) -> list[tuple[list[int], list[int]]]:
    """`count` rows of a skill as tokens: the skill, its numbers digit by digit, `=`; the answer's digits, `end`."""
    found = []
    for row in arithmetic.rows(skill, count, seed, part):
        numbers = re.findall(r"\d+", row["messages"][0]["content"])
        between = "," if skill in ("larger", "smaller") else ""
        question = [IDS[skill], *(IDS[sign] for sign in between.join(numbers)), IDS["="]]
        found.append((question, [*(IDS[sign] for sign in row["answer"].replace(" ", "")), IDS["end"]]))
    return found


def with_wrong_answers(
    rows: Sequence[tuple[list[int], list[int]]], share: float, seed: int
) -> list[tuple[list[int], list[int]]]:
    """`rows` with a share of the answers exchanged for a different answer of another row."""
    generator = random.Random(seed)
    made = list(rows)
    for index in generator.sample(range(len(rows)), round(share * len(rows))):
        question, right = rows[index]
        wrong = right
        while wrong == right:
            wrong = generator.choice(rows)[1]
        made[index] = (question, wrong)
    return made


def pretrained(seed: int, steps: int = 800) -> LlamaForCausalLM:
    """A model that knows the four kept skills and has seen 40 rows of each of the two that it will be tuned on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=64,
                intermediate_size=176,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=32,
                initializer_range=0.05,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    rows = Rows(
        [row for skill in KEPT for row in questions(skill, 3000, seed + 100, "train")]
        + [row for skill in TUNED for row in questions(skill, 40, seed + 100, "train")]
    )
    settings = TrainSettings(
        learning_rate=3e-3, max_steps=steps, effective_batch_size=128, group_by_length=False, lr_scheduler_type="cosine"
    )
    _loop(model, settings, rows, seed).run()
    return model.eval()


def _loop(model: Any, settings: TrainSettings, rows: Rows, seed: int, **more: Any) -> Loop:
    torch.manual_seed(seed)
    tuned = build("tune", {"method": "full"}).attach(model, Probe(Topology.of(model), seed))  # type: ignore[attr-defined]
    return Loop(tuned, Sft(), settings, rows, seed=seed, device="cpu", **more)


def _settings(batch: int, rate: float, **more: Any) -> TrainSettings:
    given = {"lr_scheduler_type": "constant", "warmup_steps": 0, "num_train_epochs": EPOCHS, "adam_beta2": 0.95}
    given |= {"group_by_length": False, "max_tokens_per_device": 8192}
    return TrainSettings(learning_rate=rate, effective_batch_size=batch, **(given | more))  # type: ignore[arg-type]


@torch.no_grad()
def accuracy(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> float:
    """Share of answers that greedy decoding gives whole: all of its tokens are the most probable after the right ones
    before them."""
    encoded = Rows(rows)
    batch = pad_batch([encoded[i] for i in range(len(encoded))], IDS["pad"])
    best = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1].argmax(-1)
    labels = batch["labels"][:, 1:]
    return float(((best == labels) | (labels == IGNORED)).all(-1).float().mean())


def prove(seed: int) -> Measurements:
    base = pretrained(seed)
    held_out = {skill: questions(skill, HELD_OUT, seed, "test") for skill in (*TUNED, *KEPT)}

    def score(model: Any) -> tuple[float, float]:
        """(accuracy on the two skills, on the four others), in points."""
        of = {skill: 100 * accuracy(model, rows) for skill, rows in held_out.items()}
        return fmean(of[skill] for skill in TUNED), fmean(of[skill] for skill in KEPT)

    rows = {skill: with_wrong_answers(questions(skill, ROWS // 2, seed + 200, "train"), WRONG, seed) for skill in TUNED}
    both = Rows([row for pair in zip(*rows.values(), strict=True) for row in pair])
    found: Measurements = {}
    found["tuned_skills/base"], found["kept_skills/base"] = score(base)
    histories: dict[str, EarlyDynamics] = {}
    scores: dict[str, float] = {}
    for batch in BATCHES:
        for rate in RATES:
            model = copy.deepcopy(base)
            name = f"{batch}x{rate:g}"
            histories[name] = EarlyDynamics.of(_loop(model, _settings(batch, rate), both, seed).run())
            new, old = score(model.eval())
            scores[name] = new + old
            found |= {f"tuned_skills/{name}": new, f"kept_skills/{name}": old, f"score/{name}": new + old}
    spans = [Span.of(_settings(batch, RATES[0]), len(both)) for batch in BATCHES]
    at = decision_samples(spans, fraction=0.05, min_steps=20)
    assert at is not None  # 20 steps of 512 rows are fewer than six epochs of 4,000
    for name, history in histories.items():
        found[f"early_norm/{name}"], found[f"early_loss/{name}"] = history.medians(at)
    found["samples_equal"] = float(len({history.moments[-1].samples for history in histories.values()}) == 1)
    for what in ("norm", "loss"):
        early = [found[f"early_{what}/{name}"] for name in scores]
        found[f"spearman/{what}"] = spearman(early, list(scores.values()))
    order, dominated = rank_runs(histories, samples=at)
    stopped = stop_dominated(order, dominated, keep=2)
    found["stopped"] = float(len(stopped))
    found["lost_by_stopping"] = max(scores.values()) - max(s for name, s in scores.items() if name not in stopped)
    for batch in BATCHES:
        found[f"best/{batch}"] = max(score for name, score in scores.items() if name.startswith(f"{batch}x"))
    found |= _simplifications(base, rows, both, seed, found, score)
    return found | _exact(base, both) | {"documented_order": float(_documented_order())}


def _simplifications(base: Any, rows: Any, both: Rows, seed: int, found: Measurements, score: Any) -> Measurements:
    """Scores at batch 512 and its best rate: the recipe itself, with warm-up, with cosine decay, and in phases."""
    batch = BATCHES[-1]
    rate = max(RATES, key=lambda rate: found[f"score/{batch}x{rate:g}"])
    steps = Span.of(_settings(batch, rate), len(both)).total
    made = {"simplified/plain": found[f"score/{batch}x{rate:g}"]}
    arms: dict[str, dict[str, Any]] = {
        "warmup": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": round(steps / 10)},
        "cosine": {"lr_scheduler_type": "cosine"},
    }
    for arm, more in arms.items():
        model = copy.deepcopy(base)
        _loop(model, _settings(batch, rate, **more), both, seed).run()
        made[f"simplified/{arm}"] = sum(score(model.eval()))
    first, second = rows.values()
    model = copy.deepcopy(base)
    for number, part in enumerate(([*first], [*second, *first[: len(first) // 4]])):
        skills = TUNED[: number + 1]
        unseen = [row for skill in skills for row in questions(skill, VALIDATION, seed + 300, "test")]
        settings = _settings(batch, rate, load_best_model_at_end=True)
        with TemporaryDirectory() as folder:
            _loop(model, settings, Rows(part), seed, validation=Rows(unseen), directory=Path(folder)).run()
    return made | {"simplified/phased": sum(score(model.eval()))}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, equal values at their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def _exact(base: Any, rows: Rows) -> Measurements:
    """Largest differences of loss and gradient between one pass over 16 rows and micro-batches of 1 and 4."""
    mixed = Rows([(q[: 2 + i % 4], a) for i, (q, a) in enumerate(rows.pairs[:16])])
    objective, results = Sft(), []
    for size in (16, 4, 1):
        model = copy.deepcopy(base).train()
        batches = [pad_batch([mixed[i] for i in range(s, s + size)], IDS["pad"]) for s in range(0, 16, size)]
        units = {"token": sum(objective.units(batch)["token"] for batch in batches)}
        total = 0.0
        for batch in batches:
            value = objective.loss(model, batch).value(units)
            value.backward()
            total += float(value.detach())
        results.append((total, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, gradient), *others = results
    return {
        "micro_batch_loss": max(abs(loss - other) for other, _ in others),
        "micro_batch_gradient": max(float((gradient - other).abs().max()) for _, other in others),
        "padding_loss": abs(loss - _plain_loss(base, mixed)),
    }


@torch.no_grad()
def _plain_loss(base: Any, rows: Rows) -> float:
    """The token mean by hand: row by row, without padding."""
    total, count = 0.0, 0
    for question, answer in rows.pairs:
        logits = base(input_ids=torch.tensor([question + answer]), use_cache=False).logits[0, len(question) - 1 : -1]
        total += float(F.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count


def _documented_order() -> bool:
    """Four runs by hand: `calm` beats `loud` and `hasty`, `loud` beats `hasty`; `near` lies within the margin."""
    values = {"hasty": (4.0, 1.0), "calm": (1.0, 3.0), "loud": (2.0, 2.0), "near": (1.01, 2.99)}
    histories = {
        name: EarlyDynamics(tuple(Moment(step, 8 * step, loss, norm, 80) for step in range(1, 21)))
        for name, (norm, loss) in values.items()
    }
    order, dominated = rank_runs(histories, samples=160, margin=0.02)
    right = order == ["calm", "near", "loud", "hasty"]
    right &= dominated == {"loud": ["calm", "near"], "hasty": ["calm", "near", "loud"]}
    return right and stop_dominated(order, dominated, keep=3) == ["hasty"]


def _difference(runs: Sequence[Measurements], arm: str) -> float:
    return mean(runs, f"simplified/{arm}") - mean(runs, "simplified/plain")


PROOF = Proof(
    paper=59,
    prove=prove,
    parts=["luthier.train.early_dynamics", "luthier.train.span", "luthier.train.loop", "luthier.worlds.arithmetic"],
    seeds=(0, 1),
    notes=[
        "score/BATCHxRATE is in points, 0 to 200: clean accuracy on the two tuned skills plus on the four others.",
        "Within a batch size the early norm falls as the rate rises, for the loss falls faster, and high rates forget.",
        "Across batch sizes the larger batch has the lower norm. So here the norm does not mark the better run.",
        "lost_by_stopping: points between the best run of the grid and the best that rank_runs lets go on (keep 2).",
    ],
    claims=[
        Claim(
            "loss: largest difference between micro-batches of 1, 4 and 16 rows",
            lambda runs: max(r["micro_batch_loss"] for r in runs),
            "<= 1e-5",
            "exact",
        ),
        Claim(
            "gradient: the same",
            lambda runs: max(r["micro_batch_gradient"] for r in runs),
            "<= 1e-5",
            "exact",
        ),
        Claim(
            "loss: difference from the token mean taken row by row",
            lambda runs: max(r["padding_loss"] for r in runs),
            "<= 1e-5",
            "exact",
        ),
        Claim(
            "rank_runs gives the documented order, all seeds",
            lambda runs: min(r["documented_order"] for r in runs),
            "== 1",
            "exact",
        ),
        Claim(
            "all runs of the grid have seen equally many samples",
            lambda runs: min(r["samples_equal"] for r in runs),
            "== 1",
            "exact",
        ),
        Claim(
            "sign of the correlation of early gradient norm and score, mean",
            lambda runs: mean(runs, "spearman/norm"),
            "< 0",
            "paper",
        ),
        Claim(
            "sign of the correlation of early loss and score, mean",
            lambda runs: mean(runs, "spearman/loss"),
            "> 0",
            "paper",
        ),
        Claim(
            "correlation of early gradient norm and score, mean",
            lambda runs: mean(runs, "spearman/norm"),
            "< -0.3",
            "paper",
        ),
        Claim(
            "best run with batch 512 less best with batch 16, points, mean",
            lambda runs: mean(runs, "best/512") - mean(runs, "best/16"),
            ">= -1",
            "paper",
        ),
        Claim("warm-up costs or gains at most, points", lambda runs: abs(_difference(runs, "warmup")), "<= 2", "paper"),
        Claim("cosine decay likewise", lambda runs: abs(_difference(runs, "cosine")), "<= 2", "paper"),
        Claim("phases instead of all at once likewise", lambda runs: abs(_difference(runs, "phased")), "<= 2", "paper"),
    ],
)
