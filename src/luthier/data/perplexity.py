"""Perplexity filter: train on the part of the rows that a good model finds most predictable.

    PPL of a row = exp(-mean over the tokens of its answers of log p(token | all before it))
    sort by PPL (equal ones keep their order), keep int(N * density): the lowest, the highest, or those in the middle

For large and noisy pools, such as captions from the web: broken, mislabelled and foreign rows are the least
predictable, so the lowest fifth is nearly clean, at a fifth of the cost. Only the answer counts (a caption, a
completion, what the assistant says, a whole text), never the prompt and never the marks that end a turn. Which tokens
those are follows from the chat template; the authors' script cuts 14 tokens off the front for one template.

    {text}                  every token of the text; with `prompt` set, the text as an answer to it
    {prompt, completion}    the completion
    {messages}              every answer (loss_on: last: the last one)
    {prompt, chosen, ...}   the chosen answer

Rows with an empty answer have no perplexity. They are left out, counted (`data.select_empty`), and not part of N. The
kept rows have two more keys: `ppl`, and `ppl_rank` (1 is the lowest of all N). Means are in float64 over float32
log-probabilities; the authors' script rounds probabilities to bfloat16 before the mean.

The direction matters. This recipe keeps LOW perplexity, out of noise; papers that prune clean text keep the middle or
the high part. And low perplexity also favours what is short, frequent and said again and again: the smaller `density`,
the more. Length and copies of the kept rows are therefore reported, and `data.select_narrow` warns. When not to use
it: for clean data; for a density of a few hundredths; with a scoring model that was trained on these very rows.

Liu et al. 2024, "POINTS: Improving Your Vision-language Model with Affordable Strategies" (5M to 1M pairs, density
0.2). There the scorer sees the picture too; here a scorer that does is passed in through the context.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from luthier.data.clean import content_key, empty_parts, row_text
from luthier.data.selection import Row, Selected, Selection, SelectionContext
from luthier.errors import InputError
from luthier.findings import Finding

LARGEST = 700.0  # nats a token; exp of more is no float
COPIES_LIMIT = 0.1  # share of kept rows that say what another kept row says
SHORT_LIMIT = 0.5  # median length of the kept rows over that of all
CUT_LIMIT = 0.01

Order = Literal["lowest", "highest", "middle"]


class PerplexityFilter(Selection):
    """Keep the rows that a model finds most (or least) predictable."""

    method: Literal["perplexity"] = "perplexity"
    paper: ClassVar[int | None] = 74
    density: float = Field(0.2, gt=0, le=1, description="Share of the rows that is kept.")
    order: Order = Field("lowest", description="Which part, by perplexity.")
    prompt: str | None = Field(None, description="A fixed request before the text of rows that have none of their own.")
    model: str | None = Field(None, description="The model that scores; null: the one that is going to be tuned.")

    def count(self, rows: int) -> int:
        return int(rows * self.density)

    def apply(self, rows: Sequence[Row], context: SelectionContext) -> Selected:
        full, keys, empty = array("q"), array("Q"), 0

        def asked() -> Iterator[Row]:
            nonlocal empty
            for number, row in enumerate(rows):
                if empty_parts(row):
                    empty += 1
                    continue
                full.append(number)
                keys.append(content_key(row_text(row)))
                yield self.asked(row)

        nats, tokens, cut = array("d"), array("q"), 0
        for scored in context.scorer(self.model)(asked()):
            if scored.tokens and not math.isfinite(scored.logprob):
                where = rows[full[len(nats)]].get("where")
                raise InputError(f"the scoring model gives a log-probability of {scored.logprob}", where=where)
            nats.append(-scored.logprob / scored.tokens if scored.tokens else math.nan)
            tokens.append(scored.tokens)
            cut += scored.cut
        if len(nats) != len(rows) - empty:
            what = f"the scorer gave {len(nats)} scores for {len(rows) - empty} rows"
            raise InputError(what, where="data.select")
        loss, length = np.array(nats), np.array(tokens)
        number, key = np.array(full), np.array(keys)
        silent = length == 0  # nothing of the answer is left within the context, or no token stands before it
        number, loss, length, key = number[~silent], loss[~silent], length[~silent], key[~silent]
        ranks = ranked(loss)
        chosen = within(ranks, self.count(len(loss)), self.order)
        if not chosen.any():
            what = f"density {self.density:g} of {len(loss)} rows that can be scored keeps none"
            raise InputError(what, where="data.select", fix="raise density, or give more rows")
        stats = _stats(loss, length, key, chosen) | {"empty": empty + int(silent.sum()), "cut": cut, "rows": len(rows)}
        columns = {"ppl": perplexity(loss[chosen]), "ppl_rank": ranks[chosen]}
        findings = list(_findings(stats, self.order))
        return Selected(rows, number[chosen], columns, stats=stats, findings=findings)

    def asked(self, row: Row) -> Row:
        """The row as it is scored: a bare text, if there is a `prompt`, as the answer to it."""
        if self.prompt is None or "text" not in row:
            return row
        rest = {name: value for name, value in row.items() if name != "text"}
        return {**rest, "prompt": self.prompt, "completion": row["text"]}


def perplexity(loss: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp of the mean negative log-probability in nats."""
    return np.exp(np.minimum(loss, LARGEST))


def ranked(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """(n,) the place of each value in ascending order, from 1; of equal values the earlier one comes first."""
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(1, len(values) + 1)
    return ranks


def within(ranks: NDArray[np.int64], count: int, order: Order) -> NDArray[np.bool_]:
    """(n,) which `count` of the ranks 1 to n are kept: the first, the last, or those around the middle.

    Of an odd remainder the middle leaves out one more at the high end.
    """
    below = {"lowest": 0, "highest": len(ranks) - count, "middle": (len(ranks) - count) // 2}[order]
    return (ranks > below) & (ranks <= below + count)


def _stats(
    loss: NDArray[np.float64], length: NDArray[np.int64], key: NDArray[np.uint64], chosen: NDArray[np.bool_]
) -> dict[str, Any]:
    """What the data card says: numbers of all scored rows and of the kept ones."""
    copies = len(loss[chosen]) - len(np.unique(key[chosen]))
    return {
        "scored": len(loss),
        "kept": int(chosen.sum()),
        "ppl": _spread(perplexity(loss)),
        "ppl_kept": _spread(perplexity(loss[chosen])),
        "tokens": _spread(length),
        "tokens_kept": _spread(length[chosen]),
        "copies_kept": copies,
    }


def _spread(values: NDArray[Any]) -> dict[str, float]:
    names = {"smallest": 0, "p10": 10, "p50": 50, "p90": 90, "largest": 100}
    return {name: float(np.percentile(values, at, method="inverted_cdf")) for name, at in names.items()}


def _findings(stats: dict[str, Any], order: Order) -> Iterator[Finding]:
    kept, scored, spread = stats["kept"], stats["scored"], stats["ppl_kept"]
    text = f"{kept} of {scored} training rows were kept, those of {order} perplexity"
    text += f" ({spread['smallest']:.4g} to {spread['largest']:.4g}; median of all {stats['ppl']['p50']:.4g})"
    yield Finding(level="info", code="data.select", message=text, value=kept, limit=scored)
    if count := stats["empty"]:
        text = f"{count} of {stats['rows']} training rows have nothing to score and were left out"
        yield Finding(level="warn", code="data.select_empty", message=text, value=count, limit=0)
    if stats["cut"] > CUT_LIMIT * scored:
        text = f"{stats['cut']} rows are longer than the scoring model's context and were scored up to there"
        yield Finding(level="warn", code="data.select_cut", message=text, value=stats["cut"])
    short, copies = stats["tokens_kept"]["p50"] / stats["tokens"]["p50"], stats["copies_kept"] / kept
    if short < SHORT_LIMIT or copies > COPIES_LIMIT:
        text = f"the kept rows have {short:.2f} times the median length of all, and {copies:.0%} of them are copies"
        text += "; raise density, or take copies out first"
        yield Finding(level="warn", code="data.select_narrow", message=text, value=short, limit=SHORT_LIMIT)
