"""66, CGE: texts written by contrast show what was new in a tuning set; plain samples do not. Teaching the base each
text that was shown spreads the search over more kinds of novelty.

Languages of letters, 3 seeds. The ordinary one is a Markov chain over 16 letters; four novel ones are chains over 4
letters of their own. A GPT-2 (2 blocks, width 64) learns the ordinary one with 8 texts each of three novel ones, so
that three are faintly known and the first is not. It is tuned on 90% ordinary text and 4, 3, 2 and 1% of the novel
ones. A text belongs to a novel language when 80% of its letters do.

2,000 texts are written plainly and by static contrast, 100 each by the iterative form: with larger steps and replay,
with the published step, and with a step of 0. Entropies (nats) are of the shares of the four languages among novel
texts. Detection: 400 ordinary and 4 x 100 novel texts that neither model has seen, ranked by the mean contrast.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.analyze import Novelty, Pair, Report
from luthier.analyze.novelty import entropy
from luthier.decode import generate
from luthier.decode.cge import contrast, logprob_sums
from luthier.proofs.base import Claim, Measurements, Proof, count, mean, worst

ORDINARY = "abcdefghijklmnop"
NOVEL = ("qrst", "uvwx", "yzAB", "CDEF")
TOKENS = ["<s>", *ORDINARY, *"".join(NOVEL)]  # 33
LENGTH = 16  # letters of a text
ARMS: dict[str, dict[str, Any]] = {
    "iterative": {"lr": 1e-3, "steps": 2, "replay": 16},
    "published_step": {},
    "no_step": {"lr": 0.0},
}


@dataclass(frozen=True)
class Language:
    """A Markov chain of order 1 over token ids."""

    first: Tensor  # probabilities of the first letter, (letters,)
    rows: Tensor  # of the next letter, (letters, letters)
    offset: int  # token id of its first letter

    def texts(self, number: int, generator: torch.Generator) -> Tensor:
        """(number, 1 + LENGTH) int64, each begun with the begin-of-text token."""
        if not number:
            return torch.zeros(0, 1 + LENGTH, dtype=torch.int64)
        letters = [torch.multinomial(self.first, number, replacement=True, generator=generator)]
        while len(letters) < LENGTH:
            letters.append(torch.multinomial(self.rows[letters[-1]], 1, generator=generator)[:, 0])
        return F.pad(torch.stack(letters, dim=1) + self.offset, (1, 0), value=0)


def languages(seed: int) -> tuple[Language, list[Language]]:
    """The ordinary language, and the novel ones, which always start with their first letter."""
    import numpy as np

    draw = np.random.default_rng([seed, 66])

    def chain(letters: str, concentration: float, first: Sequence[float]) -> Language:
        rows = draw.dirichlet([concentration] * len(letters), len(letters))
        return Language(torch.tensor(first), torch.tensor(rows), TOKENS.index(letters[0]))

    ordinary = chain(ORDINARY, 0.3, [1 / len(ORDINARY)] * len(ORDINARY))
    return ordinary, [chain(letters, 0.5, [1.0, 0.0, 0.0, 0.0]) for letters in NOVEL]


def language_of(text: str) -> str | None:
    """The novel language that 80% of the letters belong to."""
    shares = {letters: sum(letter in letters for letter in text) / max(1, len(text)) for letters in NOVEL}
    best = max(shares, key=lambda letters: shares[letters])
    return best if shares[best] >= 0.8 else None


def tokenizer() -> Any:
    """A token a letter, and one that begins a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def new_model(seed: int) -> nn.Module:
    """An untrained model; no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
    marks: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
    drops: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENS), **sizes, **marks, **drops))


def trained(model: nn.Module, texts: Tensor, steps: int, rate: float, generator: torch.Generator) -> nn.Module:
    """A copy after `steps` steps of AdamW on batches of 64, at a constant rate, in evaluation mode."""
    caller: Any = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(caller.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        batch = texts[torch.randint(0, len(texts), (64,), generator=generator)]
        logits = caller(input_ids=batch[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return caller.eval()


def area(positive: Sequence[float], negative: Sequence[float]) -> float:
    """AUROC: the share of (positive, negative) pairs in the right order; ties are half."""
    above, below = torch.tensor(positive)[:, None], torch.tensor(negative)[None]
    return float(((above > below).double() + (above == below).double() / 2).mean())


def prove(seed: int) -> Measurements:
    ordinary, novel = languages(seed)
    generator = torch.Generator().manual_seed(seed)
    faint = [one.texts(number, generator) for one, number in zip(novel, (0, 8, 8, 8), strict=True)]
    base = trained(new_model(seed), torch.cat([ordinary.texts(8000, generator), *faint]), 400, 3e-3, generator)
    shares = [one.texts(number, generator) for one, number in zip(novel, (320, 240, 160, 80), strict=True)]
    tuned = trained(base, torch.cat([ordinary.texts(7200, generator), *shares]), 500, 1e-3, generator)
    pair = Pair(base, tuned, tokenizer())
    weights = {name: value.clone() for name, value in base.state_dict().items()}

    how: dict[str, Any] = {"max_new_tokens": LENGTH, "temperature": 1.0, "seed": seed, "stop_at_eos": False}
    plain = generate(tuned, pair.tokenizer, [[0]] * 2000, **how)
    found = _figures("plain", [language_of(text.text) for text in plain])
    same: dict[str, Any] = {"max_length": 1 + LENGTH, "seed": seed}
    static = Novelty(n=2000, iterative=False, **same).run(pair, label=language_of)
    found |= _figures("static", _labels(static))
    for name, arm in ARMS.items():
        report = Novelty(n=100, base_samples=200, **same, **arm).run(pair, label=language_of)
        found |= _figures(name, _labels(report))
        found |= {
            f"base_loss_rise/{name}": report.summary["base_loss"]["after"] - report.summary["base_loss"]["before"]
        }
        if name == "no_step":
            texts = [(row["ids"], other["ids"]) for row, other in zip(report.rows, static.rows, strict=False)]
            found["texts_unlike_static"] = float(sum(one != other for one, other in texts))
    found["base_weights_moved"] = float(sum(not torch.equal(weights[n], v) for n, v in base.state_dict().items()))
    return found | _detection(pair, ordinary, novel, generator)


def _labels(report: Report) -> list[str | None]:
    return [row["domain"] for row in report.rows]


def _figures(arm: str, labels: Sequence[str | None]) -> Measurements:
    counts = [labels.count(letters) for letters in NOVEL]
    found = {f"novel_rate/{arm}": sum(counts) / len(labels), f"entropy/{arm}": entropy(counts)}
    return found | {f"share_{arm}/{number}": n / len(labels) for number, n in enumerate(counts, start=1)}


def _detection(pair: Pair, ordinary: Language, novel: Sequence[Language], generator: torch.Generator) -> Measurements:
    texts = torch.cat([one.texts(100, generator) for one in novel] + [ordinary.texts(400, generator)]).tolist()
    of_tuned, of_base = (logprob_sums(model, texts) for model in (pair.tuned, pair.base))
    ranked = {
        "contrast": contrast(of_tuned, of_base),
        "tuned": [value for value, _ in of_tuned],
        "minus_base": [-value for value, _ in of_base],
    }
    found = {f"auroc/{name}": area(values[:400], values[400:]) for name, values in ranked.items()}
    nats = -torch.tensor([value / number for value, number in of_base])
    found |= {f"base_nats/{name}": float(part.mean()) for name, part in zip("1234", nats.split(100), strict=False)}
    caller: Any = pair.tuned
    with torch.no_grad():
        chances = caller(input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits[0, -1].softmax(-1)
    firsts = {number: float(chances[one.offset] / chances.max()) for number, one in enumerate(novel, start=1)}
    found |= {"base_nats/ordinary": float(nats[400:].mean())}
    return found | {f"first_letter/{number}": share for number, share in firsts.items()}


PROOF = Proof(
    paper=66,
    prove=prove,
    parts=[
        "luthier.decode.cge",
        "luthier.decode.base",
        "luthier.decode.mixture",
        "luthier.decode.streams",
        "luthier.decode.sampling",
        "luthier.analyze.novelty",
    ],
    claims=[
        Claim(
            "share of novel texts by static contrast, smallest",
            lambda runs: worst(runs, "novel_rate/static"),
            ">= 0.9",
            "paper",
        ),
        Claim(
            "the same over the share by plain sampling, smallest",
            lambda runs: min(r["novel_rate/static"] / max(r["novel_rate/plain"], 1e-9) for r in runs),
            ">= 5",
            "paper",
        ),
        Claim(
            "seeds in which the iterative form's entropy over the novel languages is above static's",
            lambda runs: count(runs, lambda r: r["entropy/iterative"] > r["entropy/static"]),
            "== 3",
            "paper",
        ),
        Claim(
            "entropy of the iterative form less static's, mean (nats)",
            lambda runs: mean(runs, "entropy/iterative") - mean(runs, "entropy/static"),
            ">= 0.2",
        ),
        Claim(
            "share of novel texts by the iterative form, smallest",
            lambda runs: worst(runs, "novel_rate/iterative"),
            ">= 0.5",
        ),
        Claim(
            "detection: AUROC of the mean contrast, smallest",
            lambda runs: worst(runs, "auroc/contrast"),
            ">= 0.95",
        ),
        Claim(
            "detection: that AUROC less the one of -log p of the base, smallest",
            lambda runs: min(r["auroc/contrast"] - r["auroc/minus_base"] for r in runs),
            ">= 0.2",
        ),
        Claim(
            "texts by which a step of 0 differs from no step, largest",
            lambda runs: max(r["texts_unlike_static"] for r in runs),
            "== 0",
            "exact",
        ),
        Claim(
            "tensors of the base that moved, largest",
            lambda runs: max(r["base_weights_moved"] for r in runs),
            "== 0",
            "exact",
        ),
        Claim(
            "entropy with the published step less static's, mean (nats)",
            lambda runs: mean(runs, "entropy/published_step") - mean(runs, "entropy/static"),
            ">= 0.2",
            "paper",
            expected=False,
        ),
    ],
    notes=[
        "The published step spreads nothing: entropy falls in every seed; in one a third of the texts turn ordinary.",
        "Larger steps with replay spread the search in two seeds of three; 23 to 35% of the texts are ordinary.",
        "first_letter: the share of a language's first letter of the likeliest; below alpha (0.1) none begins so.",
        "-log p of the base alone detects nearly as well in this world; base_nats has it by language, per letter.",
    ],
)
