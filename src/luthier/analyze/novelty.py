"""Novelty: what did a tuning set hold that pre-training did not? Answered with texts, without seeing the data.

    reference = base
    for i = 1 .. n:
        x_i        one text, sampled where `tuned` says more than `reference` does      (`luthier.decode.cge`)
        reference  after one AdamW step on x_i, so that this kind of text is new no longer

Sampled without the step (`iterative: false`), the easiest novelty comes again and again; with it, others come up. The
tuned model never changes, nor does the base: the reference is a copy in float32 (in bfloat16 steps of 5e-5 are partly
rounded away).

Given rows, it looks for them instead of writing: all are scored by their mean contrast per token, the best is taken,
and learned, n times. That is the upper bound for whoever has the data.

How large the step is decides. Too small, and nothing changes within n texts; too large, and the reference forgets
ordinary text, which then counts as new. So `base_loss` tells the reference's loss on plain samples of the base before
and after: a rise is forgetting. `replay` puts plain samples of the base into every step against it (ours; so are
several `steps` per text).

A text is `max_length` tokens with its start, and end tokens do not end it, so it may run over several documents. A kind
of text whose first token is less than `alpha` times as probable as the likeliest is never begun: give a `prompt`.

A run that broke off goes on to the same texts: what it had is kept, and the steps on it are taken again.

When not to use it: for models of different vocabularies; to measure how much was learned (the texts are samples).

Isonuma and Titov, ICLR 2025 (arXiv 2410.14765); the step's settings are those of their code. Proof: luthier prove 66.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from luthier.analyze.base import Analysis, Journal, Pair, Progress, Report, Rows
from luthier.data.encode import Encoder
from luthier.data.settings import DataSettings
from luthier.decode.base import FLOOR
from luthier.decode.cge import Cge, contrast, logprob_sums, token_contrasts
from luthier.decode.generate import generate
from luthier.decode.inputs import context_length
from luthier.decode.mixture import Mixture, Opened
from luthier.decode.vocabulary import shared_vocabulary
from luthier.errors import InputError
from luthier.weights.hashing import combined, tensor_hash

Ids = Sequence[int]
Label = Callable[[str], str | None]
Learn = Callable[[Sequence[Ids], int], None]
Learner = Callable[[nn.Module, float], Learn]
_REPLAY, _BASE = 2**20, 2**21  # added to the seed, so that draws of different purposes are not the same


class Novelty(Analysis):
    """What is new in the data of a tuning.

    Attributes:
        n: texts.
        iterative: whether the reference learns each text before the next is drawn.
        alpha, gamma: of the contrast; see `luthier.decode.cge`.
        lr: learning rate of a step.
        steps: steps per text.
        replay: plain samples of the base that join a text in its steps; drawn anew for each text.
        max_length: tokens of a text, with its start; less where a model's context ends.
        prompt: what texts start with; the tokenizer's begin-of-text token alone if not given.
        base_samples: plain samples of the base on which the reference's loss is measured; 0 measures nothing.
        batch_tokens: tokens that one batch may hold.
        seed: of all draws.
    """

    method: Literal["novelty"] = "novelty"
    paper: ClassVar[int | None] = 66
    n: int = Field(default=100, ge=1)
    iterative: bool = True
    alpha: float = Field(default=0.1, ge=0, le=1)
    gamma: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    lr: float = Field(default=5e-5, ge=0, allow_inf_nan=False)
    steps: int = Field(default=1, ge=1)
    replay: int = Field(default=0, ge=0)
    max_length: int = Field(default=256, ge=2)
    prompt: str | None = None
    base_samples: int = Field(default=16, ge=0)
    batch_tokens: int = Field(default=4096, ge=1)
    seed: int = Field(default=0, ge=0)

    def run(
        self,
        pair: Pair,
        rows: Rows | None = None,
        *,
        out: Path | None = None,
        progress: Progress | None = None,
        label: Label | None = None,
        learner: Learner | None = None,
    ) -> Report:
        """Write `n` texts, or find them among `rows`.

        Args:
            pair: causal models of one vocabulary.
            rows: canonical rows; each is scored as the tokens that training would show.
            out, progress: see `Analysis.run`; progress counts texts.
            label: a text -> the name of its novel domain, or None for an ordinary one.
            learner: (reference, lr) -> a function that takes one optimiser step on texts (token ids), with a seed for
                dropout; `adamw` if not given.

        Rows of the report: `text`, `score` (nats per token, against the reference of its step), `step` (from 1),
        `ids` and `contrast` (nats of each token behind the start); `domain` with a labeller, `where` of a row.

        Raises `InputError` for models that do not fit each other, and where texts have nothing to start with.
        """
        search = _Search(self, pair, rows, learner or adamw)
        journal = Journal(out, {} if out is None else search.key())
        before = search.base_loss()
        found: list[dict[str, Any]] = []
        for row in journal.rows[: self.n]:
            search.learn(row)
            found.append(row)
        while len(found) < search.wanted:
            for row in search.next(len(found)):
                journal.add(row)
                found.append(row)
                search.learn(row)
            if progress is not None:
                progress(len(found), search.wanted)
        if label is not None:
            found = [row | {"domain": label(row["text"])} for row in found]
        summary = self._summary(found, search, label is not None)
        if before is not None:
            summary["base_loss"] = {"before": before, "after": search.base_loss(), "samples": self.base_samples}
        report = Report(summary, found)
        if out is not None:
            report.save(out)
            journal.finish()
        return report

    def _summary(self, found: Sequence[dict[str, Any]], search: _Search, labelled: bool) -> dict[str, Any]:
        scores = [row["score"] for row in found]
        summary: dict[str, Any] = {
            "settings": self.model_dump(mode="json"),
            "mode": "write" if search.pool is None else "retrieve",
            "texts": len(found),
            "mean_score": sum(scores) / len(scores),
        }
        if labelled:
            domains = Counter(row["domain"] for row in found if row["domain"] is not None)
            summary |= {
                "novel_rate": domains.total() / len(found),
                "domains": dict(domains.most_common()),
                "coverage": len(domains),
                "entropy": entropy(list(domains.values())),
            }
        return summary


def entropy(counts: Sequence[int]) -> float:
    """Of shares in proportion to `counts`, in nats; 0 if there are none."""
    whole = sum(counts)
    return -sum(c / whole * math.log(c / whole) for c in counts if c)


def adamw(model: nn.Module, lr: float) -> Learn:
    """One step of AdamW on the mean loss of some texts: all weights, no decay, gradients clipped at 1, the optimiser's
    state kept from step to step."""
    weights = [weight.requires_grad_() for weight in model.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)

    def learn(texts: Sequence[Ids], seed: int) -> None:
        device = weights[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model.train()
            try:
                text_loss(model, texts).backward()
            finally:
                model.eval()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return learn


def text_loss(model: Any, texts: Sequence[Ids]) -> torch.Tensor:
    """The mean loss (nats) over all tokens of all texts behind each first one; padding is told by length."""
    width, device = max(map(len, texts)), next(model.parameters()).device
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=device)
    labels = torch.tensor([[*text, *[-100] * (width - len(text))] for text in texts], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


class _Search:
    """One run: the reference as it is now, and where the next text comes from."""

    def __init__(self, settings: Novelty, pair: Pair, rows: Rows | None, learner: Learner):
        self.settings, self.pair = settings, pair
        for name, model in (("base", pair.base), ("tuned", pair.tuned)):
            if getattr(model.config, "is_encoder_decoder", False):
                raise InputError("it reads with an encoder; only causal models write texts of their own", where=name)
        tokenizers = {"tuned": pair.tokenizer, "base": pair.base_tokenizer or pair.tokenizer}
        self.opened = {name: Opened(getattr(pair, name), tokenizer=tokenizers[name]) for name in tokenizers}
        vocabulary = shared_vocabulary(self.opened)
        self.start = _start(pair.tokenizer, settings.prompt)
        wants_start = rows is None or (settings.iterative and settings.replay > 0)
        if wants_start and not self.start:
            fix = "set prompt to what texts shall start with"
            raise InputError("the tokenizer has no begin-of-text token and there is no prompt", where="prompt", fix=fix)
        if len(self.start) >= settings.max_length:
            what = f"the start of a text has {len(self.start)} tokens and max_length is {settings.max_length}"
            raise InputError(what, where="prompt", fix="raise max_length or shorten the prompt")
        contexts = [context_length(model) for model in (pair.base, pair.tuned)]
        limit = min([settings.max_length, *(c for c in contexts if c is not None)])
        self.pool = None if rows is None else _pool(rows, pair.tokenizer, limit)
        self.wanted = settings.n if self.pool is None else min(settings.n, len(self.pool))
        self.reference = pair.base
        if settings.iterative:
            self.reference = copy.deepcopy(pair.base).float().eval()
            self.step = learner(self.reference, settings.lr)
        self.opened["base"] = Opened(self.reference, tokenizer=tokenizers["base"])
        decoder = Cge(base=self.reference, tuned=pair.tuned, alpha=settings.alpha, gamma=settings.gamma)
        self.mixture = Mixture(decoder, self.opened, vocabulary)
        self.taken: set[int] = set()
        self._of_tuned: list[tuple[float, int]] = []
        self._of_base: list[list[int]] | None = None

    def key(self) -> dict[str, Any]:
        """What the texts depend on."""
        models = {name: _weights(getattr(self.pair, name)) for name in ("base", "tuned")}
        pool = None if self.pool is None else [len(self.pool), _hash([ids for _, ids in self.pool])]
        return {"settings": self.settings.model_dump(mode="json"), **models, "start": self.start, "rows": pool}

    def plain(self, count: int, seed: int, first: int = 0) -> list[list[int]]:
        """`count` plain samples of the base, with their start."""
        found = self._generate(self.pair.base, count, seed, first)
        return [[*self.start, *generation.ids] for generation in found]

    def base_loss(self) -> float | None:
        """The reference's mean loss (nats per token) on plain samples of the base; None if it is not measured."""
        if not (self.settings.iterative and self.settings.base_samples and self.start):
            return None
        if self._of_base is None:
            self._of_base = self.plain(self.settings.base_samples, self.settings.seed + _BASE)
        sums = logprob_sums(self.reference, self._of_base, self.settings.batch_tokens)
        return -sum(value for value, _ in sums) / sum(count for _, count in sums)

    def learn(self, row: dict[str, Any]) -> None:
        """Bring the reference past a text."""
        if self.pool is not None:
            self.taken.add(row["row"])
        if not self.settings.iterative:
            return
        place, seed, replay = row["step"] - 1, self.settings.seed, self.settings.replay
        more = self.plain(replay, seed + _REPLAY, place * replay) if replay else []
        for step in range(self.settings.steps):
            self.step([row["ids"], *more], (seed * 1_000_003 + place * self.settings.steps + step) % 2**63)

    def next(self, done: int) -> list[dict[str, Any]]:
        """The next text; without steps in between several at once."""
        if self.pool is not None:
            return self._best(done)
        count = 1 if self.settings.iterative else min(self.wanted - done, 64)
        found = []
        for place, text in enumerate(self._generate(self.mixture, count, self.settings.seed, done), start=done + 1):
            tuned, base = (text.logprobs.get(name, []) for name in ("tuned", "base"))
            gamma = self.settings.gamma
            each = [t - gamma * max(b, FLOOR) for t, b in zip(tuned, base, strict=True)] if gamma else tuned
            score = sum(each) / max(1, len(each))
            ids = [*self.start, *text.ids]
            found.append({"text": text.text, "score": score, "step": place, "ids": ids, "contrast": each})
        return found

    def _generate(self, model: nn.Module, count: int, seed: int, first: int) -> Any:
        return generate(
            model,
            self.pair.tokenizer,
            [self.start] * count,
            max_new_tokens=self.settings.max_length - len(self.start),
            temperature=1.0,
            seed=seed,
            first_number=first,
            stop_at_eos=False,
            keep_logprobs=model is self.mixture,
            batch_tokens=self.settings.batch_tokens,
        )

    def _best(self, done: int) -> list[dict[str, Any]]:
        """The rows that contrast most of those that are left: one, or all that are wanted if nothing is learned."""
        assert self.pool is not None
        texts, gamma, most = [ids for _, ids in self.pool], self.settings.gamma, self.settings.batch_tokens
        self._of_tuned = self._of_tuned or logprob_sums(self.pair.tuned, texts, most)
        left = [i for i in range(len(texts)) if i not in self.taken]
        of_reference = logprob_sums(self.reference, [texts[i] for i in left], most)
        scores = dict(zip(left, contrast([self._of_tuned[i] for i in left], of_reference, gamma), strict=True))
        best = sorted(left, key=lambda i: (-scores[i], i))[: 1 if self.settings.iterative else self.wanted - done]
        found = []
        for step, i in enumerate(best, start=done + 1):
            about = {"text": self.pair.tokenizer.decode(texts[i], skip_special_tokens=True), "score": scores[i]}
            each = token_contrasts(self.pair.tuned, self.reference, texts[i], gamma)
            about |= {"step": step, "ids": texts[i], "contrast": each, "row": i, "where": self.pool[i][0]}
            found.append(about)
        return found


def _start(tokenizer: Any, prompt: str | None) -> list[int]:
    """The ids that texts start with; none if there is neither a begin-of-text token nor a prompt."""
    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    return begin if prompt is None else [*begin, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def _pool(rows: Rows, tokenizer: Any, limit: int) -> list[tuple[str, list[int]]]:
    """(where, token ids) of every row; of a preference row the chosen side, of an unrolled conversation its whole."""
    encoder, found = Encoder(tokenizer, DataSettings(source="rows", loss_on="all")), []
    for number, row in enumerate(rows):
        ids = encoder.encode(row)[0 if "chosen" in row else -1]["input_ids"][:limit]
        if len(ids) > 1:
            found.append((str(row.get("where", number)), ids))
    if not found:
        raise InputError("there is no row of two or more tokens", where="rows")
    return found


def _weights(model: nn.Module) -> str:
    return combined({name: tensor_hash(tensor.cpu().contiguous()) for name, tensor in model.state_dict().items()})


def _hash(texts: Sequence[Ids]) -> str:
    return tensor_hash(torch.tensor([token for text in texts for token in (*text, -1)]))
