"""How well the model foresees given text.

    - {method: perplexity, name: prose, role: forgetting, source: prose.jsonl}

For each row, the log-probabilities of its tokens are summed: of a text, all; of a conversation or completion, those
that `data.loss_on` says are learned, so that the figure on the test split belongs to the training loss. Then

    score of a row    100 * exp(mean log-probability)       the geometric mean of its tokens' probabilities, in percent
    perplexity        exp(sum of negative log-probabilities of all rows / number of all tokens)

The score goes up as the model gets better, stays between 0 and 100 and weighs every row alike: that is what pairing
and gates need. Perplexity, in the summary, is the usual figure, and weighs every token alike. It can be compared
between models of one tokenizer only.

A text's first token has nothing before it and is not counted. Rows longer than the model's context, or than
`max_length`, are cut there; `cut` in the summary is their share. Several answers of one conversation are scored each
with all that stands before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from luthier.errors import InputError
from luthier.evaluate.graders import Row, expected
from luthier.evaluate.task import Context, Item, Task, finite

if TYPE_CHECKING:
    from torch import nn

    from luthier.decode.scoring import Passage

LARGEST = 700.0  # nats a token; exp of more is no float


class Perplexity(Task):
    """Log-probability of given text."""

    method: Literal["perplexity"] = "perplexity"
    max_length: int | None = Field(None, ge=2, description="Cut rows after so many tokens; null: at the context's end.")

    def check(self, rows: Sequence[Row], tokenizer: Any, context: Context, context_length: int | None = None) -> None:
        """Refuse rows of which no token can be scored."""
        self.passages(rows, tokenizer, context, context_length)

    def run(self, model: nn.Module, tokenizer: Any, rows: Sequence[Row], context: Context) -> list[Item]:
        """Score every row. Detail: `nll` (nats, summed over tokens), `tokens`, `cut`."""
        from luthier.decode.inputs import context_length
        from luthier.decode.likelihood import likelihoods

        passages = self.passages(rows, tokenizer, context, context_length(model))
        stretches = [stretch for passage in passages for stretch in passage.stretches]
        found = iter(
            likelihoods(
                model,
                [prompt for prompt, _ in stretches],
                [continuation for _, continuation in stretches],
                batch_tokens=context.batch_tokens,
                progress=self.progress(context),
            )
        )
        items = []
        for row, passage in zip(rows, passages, strict=True):
            parts = [next(found) for _ in passage.stretches]
            nll = -finite(math.fsum(part.logprob for part in parts), row)
            tokens = sum(part.tokens for part in parts)
            detail = {"nll": nll, "tokens": tokens, "cut": passage.cut}
            items.append(Item(row["id"], 100.0 * math.exp(-nll / tokens), None, expected(row), detail))
        return items

    def summary(self, items: Sequence[Item]) -> dict[str, Any]:
        """As of every task, and `perplexity`, `tokens` (in all) and `cut` (share of rows in [0, 1])."""
        figures = super().summary(items)
        tokens = sum(item.detail["tokens"] for item in items)
        if tokens:
            figures["perplexity"] = perplexity([item.detail["nll"] for item in items], tokens)
            figures["cut"] = sum(item.detail["cut"] for item in items) / len(items)
        return {**figures, "tokens": tokens}

    def passages(
        self, rows: Sequence[Row], tokenizer: Any, context: Context, context_length: int | None
    ) -> list[Passage]:
        """The tokens of each row that count, each stretch with everything before it."""
        from luthier.data.encode import Encoder
        from luthier.decode.scoring import passage

        encoder = Encoder(tokenizer, self.settings(context))
        limit = min((n for n in (self.max_length, context_length) if n is not None), default=None)
        passages = []
        for row, examples in zip(rows, encoder.encode_rows(rows), strict=True):
            made = passage(examples[:1] if "chosen" in row else examples, limit)
            if not made.stretches:
                cut = f" among its first {limit}" if made.cut else ""
                raise InputError(
                    f"the row has no token to score{cut}",
                    where=row.get("where"),
                    fix="take it out, or allow more tokens with max_length",
                )
            passages.append(made)
        return passages


def perplexity(nlls: Sequence[float], tokens: int) -> float:
    """exp(sum of `nlls` / `tokens`): `nlls` are the rows' summed negative log-probabilities in nats."""
    return math.exp(min(LARGEST, math.fsum(nlls) / tokens))
