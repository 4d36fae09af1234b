"""The model answers, a grader marks the answer.

    - {method: generation, grader: number, max_new_tokens: 64}                     the run's test split
    - {method: generation, name: puzzles, grader: "luthier.worlds.reasoning:grade", source: {callable: ..., ...}}

Decoding is greedy, so that base and tuned differ by their weights alone; `temperature` samples instead, with noise
that depends on seed and row only. The score of a row is 100 times the grader's mark.

An item also keeps how the answer ended. Many answers that ran out of tokens mean that `max_new_tokens` is too small,
or that the model never learnt to end: `unfinished` in the summary is their share.

Of the first rows the log-probability of the prompt itself is kept too. Short answers of two different models are
easily alike; if this number too is the same to the last bit, the two models are one, and the tuning was not active.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from luthier.errors import InputError
from luthier.evaluate.graders import GRADERS, Row, check_name, expected, find_grader
from luthier.evaluate.task import Context, Item, Task, finite, fits

if TYPE_CHECKING:
    from torch import nn

PROBED = 4  # rows whose prompt's log-probability is kept


class Generation(Task):
    """Answers marked by a grader."""

    method: Literal["generation"] = "generation"
    grader: str = Field("exact", description=f"One of {', '.join(GRADERS)}, or module:function.")
    max_new_tokens: int = Field(128, ge=1, le=1_000_000, description="At most so many tokens of answer.")
    stop: list[str] = Field([], description="Strings that end an answer, besides the model's own end tokens.")
    temperature: float = Field(0.0, ge=0, le=100, allow_inf_nan=False, description="0 is greedy, above it samples.")

    @field_validator("grader")
    @classmethod
    def _known_grader(cls, name: str) -> str:
        return check_name(name)

    @field_validator("stop")
    @classmethod
    def _stops_are_text(cls, stop: list[str]) -> list[str]:
        if not all(stop):
            raise ValueError("a stop string is empty, which would end every answer at once")
        return stop

    def check(self, rows: Sequence[Row], tokenizer: Any, context: Context, context_length: int | None = None) -> None:
        """Refuse a grader that is not found, rows that it cannot grade, rows without a prompt or with too long a one.

        A grader of the user's own is tried on one row only: it may be slow.
        """
        grade = find_grader(self.grader, context.import_callable)
        self.prompts(rows, tokenizer, context, context_length)
        answered = [row for row in rows if expected(row) is not None]
        for row in rows if self.grader in GRADERS else answered[:1]:
            grade(row, expected(row) or "")

    def run(self, model: nn.Module, tokenizer: Any, rows: Sequence[Row], context: Context) -> list[Item]:
        """Generate, grade. Detail: `tokens`, `finished`, and `prompt_logprob` (nats; None but for the first rows)."""
        from luthier.decode.generate import generate
        from luthier.decode.inputs import context_length
        from luthier.decode.likelihood import likelihoods

        grade = find_grader(self.grader, context.import_callable)
        prompts = self.prompts(rows, tokenizer, context, context_length(model))
        generations = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens,
            stop=tuple(self.stop),
            temperature=self.temperature,
            seed=context.seed,
            batch_tokens=context.batch_tokens,
            progress=self.progress(context),
        )
        first = prompts[:PROBED]
        probes = likelihoods(model, [p[:1] for p in first], [p[1:] for p in first], batch_tokens=context.batch_tokens)
        items = []
        for number, (row, generation) in enumerate(zip(rows, generations, strict=True)):
            probe = finite(probes[number].logprob, row) if number < len(probes) else None
            detail = {"tokens": len(generation.ids), "finished": generation.finished, "prompt_logprob": probe}
            score = 100.0 * grade(row, generation.text)
            items.append(Item(row["id"], score, generation.text, expected(row), detail))
        return items

    def summary(self, items: Sequence[Item]) -> dict[str, Any]:
        """As of every task, and `unfinished` (share in [0, 1]) and `tokens` (mean per answer)."""
        count = max(1, len(items))
        unfinished = sum(not item.detail["finished"] for item in items) / count
        tokens = sum(item.detail["tokens"] for item in items) / count
        return {**super().summary(items), "unfinished": unfinished, "tokens": tokens}

    def prompts(
        self, rows: Sequence[Row], tokenizer: Any, context: Context, context_length: int | None = None
    ) -> list[list[int]]:
        """The token ids that each answer starts from; `InputError` if there are none, or too many for the context."""
        from luthier.data.encode import Encoder

        encoder = Encoder(tokenizer, self.settings(context))
        prompts = []
        for row in rows:
            if "text" in row:
                raise InputError(
                    "a row of plain text has no prompt to answer",
                    where=row.get("where"),
                    fix="use the task perplexity, or rows with a prompt",
                )
            ids = encoder.prompt_ids(row)
            if not ids:
                raise InputError("the prompt is empty", where=row.get("where"))
            fits(len(ids) + 1, context_length, row, "the prompt with one token of answer")
            prompts.append(ids)
        return prompts
