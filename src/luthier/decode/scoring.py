"""How probable a model finds the answers of rows: from canonical rows to one log-probability each, as they stream by.

    score = answer_scorer(model, tokenizer, settings)
    for scored in score(rows): scored.logprob, scored.tokens

Which tokens count is what `luthier.data.encode` says is learned, so that a score means the same as a training loss;
here without the marks that end a turn (a model is sure of those, and in a short answer they weigh much). The marks are
those that the tokenizer and the chat template end an answer with, found by rendering, not by counting tokens.

Only a chunk of rows is held at a time; within it rows of like length run together. A row longer than the model's
context is scored up to there and marked as cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from luthier.data.encode import IGNORED, Encoded, Encoder
from luthier.data.selection import Row, Scored, Scorer
from luthier.data.templates import end_token_ids
from luthier.decode.inputs import context_length
from luthier.decode.likelihood import likelihoods

if TYPE_CHECKING:
    from torch import nn

    from luthier.data.settings import DataSettings

ROWS_AT_ONCE = 512


class Passage(NamedTuple):
    """One row made ready: (prompt, continuation) of each stretch of tokens that counts, and whether it was cut."""

    stretches: list[tuple[list[int], list[int]]]
    cut: bool


def passage(examples: Sequence[Encoded], limit: int | None, ends: Collection[int] = ()) -> Passage:
    """The labelled stretches of a row's examples, each with everything before it.

    Args:
        limit: tokens after which an example is cut.
        ends: ids that are taken off the end of each stretch; a stretch of nothing else is left out.
    """
    stretches, cut = [], False
    for example in examples:
        ids, labels = example["input_ids"][:limit], example["labels"][:limit]
        cut |= len(ids) < len(example["input_ids"])
        for start, end in _runs([label != IGNORED for label in labels]):
            while end > start and ids[end - 1] in ends:
                end -= 1
            if end > start:
                stretches.append((ids[:start], ids[start:end]))
    return Passage(stretches, cut)


def answer_scorer(
    model: nn.Module,
    tokenizer: Any,
    settings: DataSettings,
    *,
    batch_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> Scorer:
    """A scorer of the answers of rows under the causal language model `model`.

    Args:
        settings: `template`, `system` and `loss_on` are used; with loss_on: all, the answers count all the same.
        batch_tokens: tokens, padding included, that one batch may hold.
        progress: called with the number of rows done.

    Of a preference row the chosen answer is scored. The scorer raises `InputError` for a row that the chat template
    refuses.
    """
    wanted = settings.model_copy(update={"loss_on": "assistant"}) if settings.loss_on == "all" else settings
    encoder, ends, limit = Encoder(tokenizer, wanted), frozenset(end_token_ids(tokenizer)), context_length(model)

    def score(rows: Iterable[Row]) -> Iterator[Scored]:
        source, done = iter(rows), 0
        while chunk := list(islice(source, ROWS_AT_ONCE)):
            passages = [
                passage(examples[:1] if "chosen" in row else examples, limit, ends)
                for row, examples in zip(chunk, encoder.encode_rows(chunk), strict=True)
            ]
            stretches = [stretch for part in passages for stretch in part.stretches]
            prompts, answers = [prompt for prompt, _ in stretches], [answer for _, answer in stretches]
            found = iter(likelihoods(model, prompts, answers, batch_tokens=batch_tokens))
            for part in passages:
                parts = [next(found) for _ in part.stretches]
                yield Scored(sum(p.logprob for p in parts), sum(p.tokens for p in parts), part.cut)
            done += len(chunk)
            if progress is not None:
                progress(done)

    return score


def _runs(counted: Sequence[bool]) -> list[tuple[int, int]]:
    """The (start, end) of each stretch of true values, the first position aside."""
    runs, start = [], None
    for position in range(1, len(counted) + 1):
        inside = position < len(counted) and counted[position]
        if inside and start is None:
            start = position
        elif not inside and start is not None:
            runs.append((start, position))
            start = None
    return runs
